"""Everything on one GPU in under eight minutes: `python -m benchmarks.gpu [FILE]` (results/bench-gpu/gpu.json).

The file is written again after every section, so that an interrupted run loses nothing but the section it was in.
Training and prefill run under bfloat16 autocast, decoding in float32.
"""

import copy
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from benchmarks.contenders import Contender, build
from benchmarks.harness import Entry, Plan, Run, compare
from benchmarks.limits import measure_limits, synchronize
from benchmarks.parts import scan_entries
from pmnet import PMNetCache, PMNetConfig, pmnet_119m
from pmnet.report.flops import TRAINING_FACTOR
from pmnet.report.provenance import provenance, write_json

Result = TypeVar("Result")

NAMES = ["ours", "published", "llama"]
TOTAL_SECONDS = 460.0
CONTEXT = 1024  # positions read before decoding
STEPS = 32  # bytes decoded in a run


def training(
    config: PMNetConfig, device: torch.device, batch: int, length: int, compiled: bool, plan: Plan, peak: float
) -> dict[str, Any]:
    """Bytes per second and share of the measured bfloat16 matrix product (`fraction_of_limit`, the MFU) of training.

    Args:
        config: size of all contenders.
        device: where.
        batch: B; halved while memory does not suffice.
        length: T.
        compiled: trace the step of ours and of Llama with torch.compile; the published form is left eager, it
            reads sizes back to the host.
        plan: rounds and budget.
        peak: FLOP per second of the matrix product.
    """
    names = [name for name in NAMES if not (compiled and name == "published")]
    while True:
        try:
            entries = [_step(model, batch, device, compiled) for model in build(config, names, device)]
            rows, left_out = compare(entries, batch, length, length, plan, peak)
            return {"rows": rows, "left_out": left_out}
        except torch.OutOfMemoryError:
            if batch == 1:
                raise
        batch //= 2
        torch.cuda.empty_cache()


def _step(model: Contender, batch: int, device: torch.device, compiled: bool) -> Entry:
    model.module.train()
    optimizer = torch.optim.AdamW(model.module.parameters(), fused=True)
    loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss
    facts: dict[str, Any] = {"parameters": model.parameters}

    def prepare(length: int) -> Run:
        ids = _ids(batch, length, device)

        def step() -> None:
            with torch.autocast(device.type, torch.bfloat16):
                value = loss(ids)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

        _, facts["peak_bytes"] = _with_peak(step, device)
        return step

    def needs(length: int) -> float:
        return TRAINING_FACTOR * batch * length * model.flops(length)

    return Entry(model.name, prepare, needs, facts)


@torch.no_grad()
def decoding(config: PMNetConfig, device: torch.device, streams: int, plan: Plan, read: float) -> dict[str, Any]:
    """Bytes per second of `streams` streams decoded together; ours eager and, on a GPU, replayed as a CUDA graph.

    Published and Llama run eagerly: the former reads sizes back to the host, the latter's cache grows.

    Args:
        config: size of all contenders.
        device: where.
        streams: B.
        plan: rounds and budget.
        read: bytes per second that memory can be read with.
    """
    ids = _ids(streams, CONTEXT, device)
    models = build(config, NAMES, device)
    entries, left_out = [_decode(model.name, model, ids) for model in models], []
    if device.type == "cuda":
        ours = models[0]
        try:
            replay = capture(partial(advance, ours.module, ours.prefill(ids), ids[:, :1].clone()))
            entries.append(_decode("ours, CUDA graph", ours, ids, replay))
        except RuntimeError as error:
            left_out.append({"contender": "ours, CUDA graph", "reason": str(error).splitlines()[0]})
    rows, slow = compare(entries, streams, STEPS, 4, plan, read)
    return {"context": CONTEXT, "rows": rows, "left_out": left_out + slow}


def _decode(name: str, model: Contender, ids: Tensor, replay: Run | None = None) -> Entry:
    model.module.eval()

    def prepare(steps: int) -> Run:
        state = model.prefill(ids) if replay is None else None

        def run() -> None:
            for _ in range(steps):
                if replay is None:
                    model.step(ids[:, :1], state)
                else:
                    replay()
            if replay is None:
                model.rewind(state, steps)

        return run

    def needs(steps: int) -> float:
        return steps * model.decode_bytes(*ids.shape)

    return Entry(name, prepare, needs, {"parameters": model.parameters})


def advance(model: torch.nn.Module, cache: PMNetCache, ids: Tensor) -> Tensor:
    """Logits `[B, 1, V]` of one step, the new state copied into the tensors of `cache`, which stay where they are.

    The cache's count of columns does not move; the model only asks whether there were any.
    """
    moving = copy.copy(cache)
    logits = model(ids, past_key_values=moving).logits
    for old, new in zip(cache.tensors(), moving.tensors(), strict=True):
        old.copy_(new)
    return logits


def capture(step: Run) -> Run:
    """A CUDA graph of `step`, after a warm-up on a stream of its own; call the result to replay it."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Run) -> None:
    """Replay; `step` is only held, because the graph reads and writes tensors that nothing else may keep alive."""
    graph.replay()


@torch.no_grad()
def prefill(
    config: PMNetConfig, device: torch.device, size: int, chunks: dict[str, int], seconds: float
) -> dict[str, Any]:
    """Read a stream of `size` bytes in chunks; a contender stops where its share of `seconds` ends.

    Args:
        config: size of all contenders.
        device: where.
        size: bytes.
        chunks: bytes per call for each contender (the published form's attention is a mask of all pairs).
        seconds: budget.

    Returns:
        Rows with bytes read, whether that is all, seconds, bytes per second and, on a GPU, the peak of memory beyond
        the weights.
    """
    ids, rows = _ids(1, size, device), []
    for name, chunk in chunks.items():
        model = build(config, [name], device)[0]
        model.module.eval()
        _read_stream(model, ids[:, :chunk], chunk, seconds)  # warm-up
        (done, elapsed), peak = _with_peak(partial(_read_stream, model, ids, chunk, seconds / len(chunks)), device)
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
    config: PMNetConfig, device: torch.device, batch: int, length: int, plan: Plan, copied: float
) -> dict[str, Any]:
    """The phase scan against the rate of a device copy, `copied` bytes per second, read and written together."""
    rows, left_out = compare(scan_entries(config, batch, device), batch, length, length, plan, copied)
    return {"rows": rows, "left_out": left_out}


def _ids(batch: int, length: int, device: torch.device) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)


def _with_peak(run: Callable[[], Result], device: torch.device) -> tuple[Result, int | None]:
    """What a run returns, and the bytes it needs beyond what was allocated before it; None on the CPU."""
    if device.type != "cuda":
        return run(), None
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    return run(), torch.cuda.max_memory_allocated(device) - before


def main(path: Path) -> None:
    """Measure all sections that fit into `TOTAL_SECONDS`; one sentence and exit code 1 without a GPU."""
    if not torch.cuda.is_available():
        sys.exit("benchmarks.gpu needs a GPU that torch can use, and there is none")
    began, device, config = time.monotonic(), torch.device("cuda"), pmnet_119m()
    limits = measure_limits(device)
    best = {name: 1e9 * limit["best"] for name, limit in limits.items()}
    peak, read, copied = best["bf16_matmul_gflops"], best["read_gbs"], best["copy_gbs"]
    content: dict[str, Any] = {**provenance(), "model": config.to_dict(), "limits": limits, "sections": {}}

    def plan(seconds: float) -> Plan:
        return Plan(repeats=7, seconds=seconds, wait=partial(synchronize, device))

    chunks = {"ours": 64 * 1024, "published": 4096, "llama": 4096}
    sections: list[tuple[str, float, Callable[[float], dict[str, Any]]]] = [
        ("scan", 10, lambda s: scan(config, device, 8, 8192, plan(s), copied)),
        ("decode 1", 40, lambda s: decoding(config, device, 1, plan(s), read)),
        ("decode 64", 40, lambda s: decoding(config, device, 64, plan(s), read)),
        ("train", 80, lambda s: training(config, device, 4, 4096, False, plan(s), peak)),
        ("prefill", 90, lambda s: prefill(config, device, 2**20, chunks, s)),
        ("train compiled", 150, lambda s: training(config, device, 4, 4096, True, plan(s), peak)),
    ]
    for name, seconds, measure in sections:
        if time.monotonic() - began + seconds > TOTAL_SECONDS:
            content["sections"][name] = {"skipped": "no time left"}
        else:
            try:
                content["sections"][name] = measure(seconds)
            except RuntimeError as error:
                content["sections"][name] = {"failed": str(error).splitlines()[0]}
        torch.cuda.empty_cache()
        write_json(path, content)
        print(f"{time.monotonic() - began:5.0f} s  {name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "results/bench-gpu/gpu.json"))
