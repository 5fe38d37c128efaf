"""The cases of `pmnet bench`, by name, and how a result is stored."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, build
from benchmarks.harness import Entry, Plan, Run, compare
from benchmarks.limits import best_device, measure_limits, synchronize
from benchmarks.memory import measure_memory
from benchmarks.parts import read_entries, scan_entries
from benchmarks.stream import measure_stream
from benchmarks.table import section, write_table
from pmnet import PMNetConfig, PMNetForCausalLM
from pmnet.report.flops import TRAINING_FACTOR, facts
from pmnet.report.provenance import provenance, write_json
from pmnet.train.recipes import RECIPES

__all__ = ["CASES", "Case", "Options", "choose", "section", "store", "write_table"]

CONTEXT = 256  # positions read before decoding: more than every window
STEPS = 32  # bytes decoded in a run
EVERYONE = ["ours", "published", "llama", "mamba"]
TRAINED = [*EVERYONE, "ours-checkpointed"]


@dataclass(frozen=True)
class Options:
    """What the command line decides.

    Attributes:
        repeats: rounds.
        seconds: time budget of a case.
        size: bytes of the stream case.
        device: where to measure; the accelerator if there is one.
    """

    repeats: int = 7
    seconds: float = 120.0
    size: int = 2**20
    device: torch.device = field(default_factory=best_device)


Measure = Callable[[str, PMNetConfig, Options], dict[str, Any]]


@dataclass(frozen=True)
class Case:
    """A measurement: its name, one sentence, and the function that makes it."""

    name: str
    description: str
    measure: Measure


def choose(names: list[str]) -> list[Case]:
    """The named cases, or all.

    Raises:
        ValueError: if there is no such case.
    """
    for name in names:
        if name not in CASES:
            raise ValueError(f"unknown case {name!r}; there are {', '.join(CASES)}")
    return [CASES[name] for name in names or CASES]


def store(case: Case, preset: str, config: PMNetConfig, options: Options, folder: Path) -> Path:
    """Measure a case and write `folder/<case>-<preset>.json`; returns its path."""
    result = case.measure(preset, config, options)
    path = folder / f"{case.name}-{preset}.json"
    head = {"case": case.name, "description": case.description, "preset": preset, "device": options.device.type}
    write_json(path, {**provenance(), **head, "model": config.to_dict(), **result})
    return path


def timed(entries: list[Entry], batch: int, length: int, shortest: int, limit: str, options: Options) -> dict[str, Any]:
    """Compare entries whose needs are FLOP or bytes with a key of `measure_limits`, measured just before."""
    limits = measure_limits(options.device)
    plan = Plan(options.repeats, options.seconds, wait=partial(synchronize, options.device))
    rows, left_out = compare(entries, batch, length, shortest, plan, 1e9 * limits[limit]["best"])
    return {"kind": "timed", "limit": limit, "limits": limits, "rows": rows, "left_out": left_out}


def training_shape(preset: str) -> tuple[int, int]:
    """B and T of a training step: those of the demo's recipe, one sequence of 1,024 bytes for the others."""
    return (RECIPES["copy-paste"]["demo"]().batch_size, 160) if preset == "demo" else (1, 1024)


def _ids(batch: int, length: int, options: Options) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0)).to(options.device)


def _facts(model: Contender) -> dict[str, Any]:
    return {"parameters": model.parameters, "remark": model.remark}


def _scan(preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    batch, length = training_shape(preset)
    return timed(scan_entries(config, batch, options.device), batch, length, 16, "copy_gbs", options)


def _read(preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    batch, length = training_shape(preset)
    return timed(read_entries(config, batch, options.device), batch, length, 16, "matmul_gflops", options)


def _train(compiled: bool, preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    batch, length = training_shape(preset)

    def entry(model: Contender) -> Entry:
        model.module.train()
        optimizer = torch.optim.AdamW(model.module.parameters(), fused=True)
        loss = torch.compile(model.loss, dynamic=False) if compiled else model.loss

        def prepare(positions: int) -> Run:
            ids = _ids(batch, positions, options)

            def step() -> None:
                loss(ids).backward()
                optimizer.step()
                optimizer.zero_grad()

            if compiled:
                step()  # traces
            return step

        def needs(positions: int) -> float:
            return TRAINING_FACTOR * batch * positions * model.flops(positions)

        return Entry(model.name, prepare, needs, _facts(model))

    names = [name for name in (EVERYONE if compiled else TRAINED) if not (compiled and name == "mamba")]
    result = timed(
        [entry(model) for model in build(config, names, options.device)],
        batch, length, length if compiled else min(length, 32), "matmul_gflops", options,
    )  # fmt: skip
    if compiled:
        result["left_out"].append({"contender": "mamba", "reason": "torch.compile unrolls its loop over positions"})
    return {**result, "counts": facts(config, length)}


@torch.no_grad()
def _prefill(length: int, preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    def entry(model: Contender) -> Entry:
        model.module.eval()

        def prepare(positions: int) -> Run:
            return partial(model.prefill, _ids(1, positions, options))

        return Entry(model.name, prepare, lambda positions: positions * model.flops(positions), _facts(model))

    names = EVERYONE if length <= 1024 else ["ours", "published"]  # the others take minutes a run
    entries = [entry(model) for model in build(config, names, options.device)]
    return {**timed(entries, 1, length, 32, "matmul_gflops", options), "counts": facts(config, length)}


@torch.no_grad()
def _decode(batch: int, names: list[str], preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    def entry(model: Contender) -> Entry:
        model.module.eval()
        ids = _ids(batch, CONTEXT, options)

        def prepare(steps: int) -> Run:
            state = model.prefill(ids)

            def decode() -> None:
                for step in range(steps):
                    model.step(ids[:, step : step + 1], state)
                model.rewind(state, steps)

            return decode

        def needs(steps: int) -> float:
            return steps * model.decode_bytes(batch, CONTEXT)

        return Entry(model.name, prepare, needs, {**_facts(model), "context": CONTEXT})

    entries = [entry(model) for model in build(config, names, options.device)]
    return {**timed(entries, batch, STEPS, 4, "read_gbs", options), "counts": facts(config)}


def _memory(preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    return measure_memory(TRAINED, preset, *training_shape(preset), options.seconds)


def _stream(preset: str, config: PMNetConfig, options: Options) -> dict[str, Any]:
    torch.manual_seed(0)
    return measure_stream(PMNetForCausalLM(config).eval().to(options.device), options.size)


CASES = {
    case.name: case
    for case in (
        Case(
            "scan",
            "Write of the last level alone, forward: rotations rounded, summed per group, back to angles.",
            _scan,
        ),
        Case("read", "Memory read of one layer alone, from the phase field, forward.", _read),
        Case("train", "Full training step: forward, backward, AdamW; float32, not compiled.", partial(_train, False)),
        Case("train-compiled", "The same step traced by torch.compile.", partial(_train, True)),
        Case("prefill", "Reading 1,024 bytes into a fresh state, all logits.", partial(_prefill, 1024)),
        Case("prefill-long", "Reading 16,384 bytes into a fresh state, all logits.", partial(_prefill, 16384)),
        Case("decode", f"Byte after byte, one stream, after {CONTEXT} bytes.", partial(_decode, 1, EVERYONE)),
        Case("decode-8", f"Byte after byte, 8 streams at once, after {CONTEXT} bytes.", partial(_decode, 8, EVERYONE)),
        Case(
            "decode-int8",
            "As decode, beside ours with 8-bit weights (on the CPU).",
            partial(_decode, 1, ["ours", "ours-int8", "published"]),
        ),
        Case("memory", "Peak resident memory of three training steps, each contender in its own process.", _memory),
        Case("stream", "One long stream of random bytes in chunks: constant memory, constant rate.", _stream),
    )
}
