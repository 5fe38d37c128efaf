"""Everything on one GPU in under eight minutes: `python -m benchmarks.gpu` (results/bench-gpu/*.json, one a section).

Every section is a process of its own, so that they compile at the same time; they measure one after the other. One
section alone: `python -m benchmarks.gpu SECTION`. Training and prefill run under bfloat16 autocast.
"""

import functools
import os
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.contenders import Contender, build
from benchmarks.gpu_decode import NAMES, Alone, decoding, random_bytes, replayed
from benchmarks.harness import Entry, Plan, Run, compare
from benchmarks.limits import measure_limits, synchronize
from benchmarks.parts import scan_entries, sorted_scan_entry
from benchmarks.turns import run_all, turn
from pmnet import PMNetConfig, pmnet_119m
from pmnet.report.flops import TRAINING_FACTOR
from pmnet.report.provenance import provenance, write_json

Result = TypeVar("Result")

TURNS = "PMNET_TURNS"  # environment variable: where the sections that run at the same time meet
FOLDER = Path("results/bench-gpu")


def training(
    config: PMNetConfig,
    device: torch.device,
    batch: int,
    length: int,
    compiled: bool,
    plan: Plan,
    peak: float,
    alone: Alone = nullcontext,
) -> dict[str, Any]:
    """Bytes per second and share of the measured bfloat16 matrix product (`fraction_of_limit`, the MFU) of training.

    Args:
        config: size of all contenders.
        device: where.
        batch: B.
        length: T.
        compiled: ours only, traced with torch.compile, and its gradients beside those of the model that is not.
        plan: rounds and budget.
        peak: FLOP per second of the matrix product.
        alone: entered for the measurement, after the first step.
    """
    models = build(config, ["ours"] if compiled else NAMES, device)
    check = {"check": compare_gradients(models[0], random_bytes(batch, length, device))} if compiled else {}
    entries, left_out = [], []
    for entry in (_step(model, batch, device, compiled) for model in models):
        try:
            entry.prepare(length)
            entries.append(entry)
        except torch.OutOfMemoryError:
            left_out.append({"contender": entry.name, "reason": "out of memory"})
    with alone():
        rows, slow = compare(entries, batch, length, length, plan, peak)
    return {**check, "rows": rows, "left_out": left_out + slow}


def compare_gradients(model: Contender, ids: Tensor) -> dict[str, Any]:
    """Compiled and not, under autocast, beside float32 without either: losses, and the norm of gradients' differences.

    A difference is that of all gradients as one vector, relative to the norm of the float32 one.
    """
    losses, gradients = {}, {}
    model.module.train()
    for name, half, loss in (
        ("float32", False, model.loss),
        ("autocast", True, model.loss),
        ("compiled", True, torch.compile(model.loss, dynamic=False)),
    ):
        with torch.autocast(ids.device.type, torch.bfloat16, enabled=half):
            value = loss(ids)
        value.backward()
        losses[name] = float(value.detach())
        gradients[name] = torch.cat([p.grad.flatten() for p in model.module.parameters() if p.grad is not None])
        model.module.zero_grad()
    size = gradients["float32"].norm()
    differences = {name: float((g - gradients["float32"]).norm() / size) for name, g in gradients.items()}
    differences["compiled from autocast"] = float((gradients["compiled"] - gradients["autocast"]).norm() / size)
    return {"losses": losses, "differences": differences}


def _step(model: Contender, batch: int, device: torch.device, compiled: bool) -> Entry:
    model.module.train()
    optimizer = torch.optim.AdamW(model.module.parameters(), fused=True)
    loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    facts: dict[str, Any] = {"parameters": model.parameters}

    @functools.cache
    def prepare(length: int) -> Run:
        ids = random_bytes(batch, length, device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        _, facts["peak_bytes"] = _with_peak(step, device)
        return step

    def needs(length: int) -> float:
        return TRAINING_FACTOR * batch * length * model.flops(length)

    return Entry(model.name, prepare, needs, facts)


@torch.no_grad()
def prefill(
    config: PMNetConfig,
    device: torch.device,
    size: int,
    chunks: dict[str, int],
    seconds: float,
    alone: Alone = nullcontext,
) -> dict[str, Any]:
    """Read a stream of `size` bytes in chunks; a contender stops where its share of `seconds` ends.

    Args:
        config: size of all contenders.
        device: where.
        size: bytes.
        chunks: bytes per call for each contender (the published form's attention is a mask of all pairs).
        seconds: budget.
        alone: entered for the measurement.

    Returns:
        Rows with bytes read, whether that is all, seconds, bytes per second and, on a GPU, the peak of memory beyond
        the weights.
    """
    ids, rows = random_bytes(1, size, device), []
    for name, chunk in chunks.items():
        model = build(config, [name], device)[0]
        model.module.eval()
        _read_stream(model, ids[:, :chunk], chunk, seconds)  # warm-up
        with alone():
            share = seconds / len(chunks)
            (done, elapsed), peak = _with_peak(partial(_read_stream, model, ids, chunk, share), device)
        figures = {"bytes": done, "complete": done == size, "seconds": elapsed, "bytes_per_second": done / elapsed}
        facts = {"contender": name, "parameters": model.parameters, "chunk": chunk}
        rows.append({**facts, **figures, "peak_bytes": peak})
    return {"rows": rows}


def _read_stream(model: Contender, ids: Tensor, chunk: int, seconds: float) -> tuple[int, float]:
    """Bytes read, and how long it took; after `seconds` no further chunk is begun."""
    start, done, elapsed, state = time.perf_counter(), 0, 0.0, None
    for part in ids.split(chunk, dim=1):
        if elapsed > seconds:
            break
        with torch.autocast(ids.device.type, torch.bfloat16):
            if state is None:
                state = model.prefill(part)
            else:
                model.step(part, state)
        synchronize(ids.device)
        done, elapsed = done + part.shape[1], time.perf_counter() - start
    return done, elapsed


def scan(
    config: PMNetConfig,
    device: torch.device,
    batch: int,
    length: int,
    plan: Plan,
    copied: float,
    alone: Alone = nullcontext,
) -> dict[str, Any]:
    """The phase scan against the rate of a device copy, `copied` bytes per second, read and written together.

    On a GPU ours is replayed as a CUDA graph, so that launches from the host are not what is timed.
    """
    entries = scan_entries(config, batch, device)
    if device.type == "cuda":
        for ours in (entries[0], sorted_scan_entry(config, batch, device)):
            prepare = functools.cache(lambda length, ours=ours: replayed(ours.prepare(length)))
            entries.append(Entry(f"{ours.name}, CUDA graph", prepare, ours.needs))
    with alone():
        rows, left_out = compare(entries, batch, length, length, plan, copied)
    return {"rows": rows, "left_out": left_out}


def _with_peak(run: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What a run returns, and the bytes it needs beyond what was allocated before it; None on the CPU."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return run(), torch.cuda.max_memory_allocated(device) - before


SECTIONS: dict[str, Callable[[PMNetConfig, torch.device, Plan, dict[str, float], Alone], dict[str, Any]]] = {
    "scan": lambda c, d, p, best, alone: scan(c, d, 8, 8192, p, best["copy_gbs"], alone),
    "prefill": lambda c, d, p, best, alone: prefill(
        c, d, 2**20, {"ours": 65536, "published": 4096, "llama": 4096}, 18.0, alone
    ),
    "train": lambda c, d, p, best, alone: training(c, d, 4, 4096, False, p, best["bf16_matmul_gflops"], alone),
    "train-compiled": lambda c, d, p, best, alone: training(c, d, 4, 4096, True, p, best["bf16_matmul_gflops"], alone),
} | {
    f"decode-{streams}-{str(dtype).split('.')[1]}": (
        lambda c, d, p, best, alone, streams=streams, dtype=dtype: decoding(
            c, d, streams, dtype, p, best["read_gbs"], alone
        )
    )
    for streams, dtype in ((1, torch.float32), (1, torch.bfloat16), (64, torch.bfloat16))
}


def measure(name: str) -> None:
    """Measure a section and write its file."""
    device, config, folder = torch.device("cuda"), pmnet_119m(), os.environ.get(TURNS)
    alone: Alone = nullcontext if folder is None else partial(turn, Path(folder), name, list(SECTIONS))
    limits = measure_limits(device, count=2**31)
    best = {key: 1e9 * limit["best"] for key, limit in limits.items()}
    plan = Plan(repeats=7, seconds=8.0, wait=partial(synchronize, device))
    content = {**provenance(), "model": config.to_dict(), "limits": limits}
    try:
        content |= SECTIONS[name](config, device, plan, best, alone)
    finally:
        write_json(FOLDER / f"{name}.json", content)


def main(arguments: list[str]) -> None:
    """Measure all sections, or the one that is named; one sentence and exit code 1 without a GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU that torch can use, and there is none")
    if arguments:
        if arguments[0] not in SECTIONS:
            sys.exit(f"there is no section {arguments[0]!r}; there are {', '.join(SECTIONS)}")
        measure(arguments[0])
        return
    with tempfile.TemporaryDirectory() as folder:
        os.environ[TURNS] = folder
        codes = run_all({name: ["-m", "benchmarks.gpu", name] for name in SECTIONS}, Path(folder))
    if any(codes.values()):
        sys.exit(f"these sections failed: {', '.join(name for name, code in codes.items() if code)}")


if __name__ == "__main__":
    main(sys.argv[1:])
