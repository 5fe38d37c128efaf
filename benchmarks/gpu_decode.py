"""Decoding on a GPU: ours eager and as CUDA graphs, beside the published form and Llama. A section of `gpu.py`."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.contenders import Contender, Ours, build
from benchmarks.harness import Entry, Plan, Run, compare
from pmnet import DecodeGraph, PMNetCache, PMNetConfig
from pmnet.model.graph import capture

Alone = Callable[[], AbstractContextManager[None]]  # holds while something is measured

NAMES = ["ours", "published", "llama"]
CONTEXT = 1024  # positions read before decoding
STEPS = 32  # bytes decoded in a run
CHECKED = 8  # bytes that a graph and the model read beside each other before the graph is timed


@torch.no_grad()
def decoding(
    config: PMNetConfig,
    device: torch.device,
    streams: int,
    dtype: torch.dtype,
    plan: Plan,
    read: float,
    alone: Alone = nullcontext,
) -> dict[str, Any]:
    """Bytes per second of `streams` streams decoded together; ours eager and, on a GPU, replayed as CUDA graphs.

    Published (in float32 only: its phases are of the model's dtype) and Llama run eagerly: the former reads sizes back
    to the host, the latter's cache grows.

    Args:
        config: size of all contenders.
        device: where.
        streams: B.
        dtype: of the weights.
        plan: rounds and budget.
        read: bytes per second that memory can be read with.
        alone: entered for the measurement, when graphs are captured.
    """
    ids = random_bytes(streams, CONTEXT, device)
    models = build(config, NAMES if dtype == torch.float32 else ["ours", "llama"], device)
    for model in models:
        model.module.eval().to(dtype)
    entries = [_decode(model.name, model, ids) for model in models]
    ours = models[0]
    if device.type == "cuda" and isinstance(ours, Ours):
        replay = replayed(partial(advance, ours.module, ours.prefill(ids), ids[:, :1].clone()))
        entries.append(_decode("ours, CUDA graph", ours, ids, replay))
        graph = DecodeGraph(ours.module, ours.prefill(ids))
        entry = _decode("ours, compiled CUDA graph", ours, ids, partial(graph, ids[:, :1].clone()))
        entry.facts["check"] = compare_steps(ours, ids, graph)
        entries.append(entry)
    with alone():
        rows, left_out = compare(entries, streams, STEPS, 4, plan, read)
    return {"context": CONTEXT, "dtype": str(dtype), "rows": rows, "left_out": left_out}


def compare_steps(model: Ours, ids: Tensor, graph: DecodeGraph) -> dict[str, Any]:
    """A graph and the model read the same bytes: largest differences of logits, step by step, and of states."""
    cache, logits, largest = model.prefill(ids), [], 0.0
    for t in range(CHECKED):
        found, expected = graph(ids[:, t : t + 1]).clone(), model.step(ids[:, t : t + 1], cache)
        logits.append(float((found - expected).abs().max()))
        largest = max(largest, float(expected.abs().max()))
    pairs = zip(graph.cache().memory, cache.memory, strict=True)
    turns = [float((a - b).double().abs().max()) / 2**32 for a, b in pairs]  # int32 differences wrap as a circle
    return {"logits": logits, "largest_logit": largest, "states_in_turns": turns}


def _decode(name: str, model: Contender, ids: Tensor, replay: Callable[[], object] | None = None) -> Entry:
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
        itemsize = next(model.module.parameters()).dtype.itemsize
        return steps * model.decode_bytes(*ids.shape) * itemsize / 4

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


def replayed(step: Callable[[], object]) -> Callable[[], object]:
    """Replays a CUDA graph of `step`, and keeps the tensors that `step` holds."""
    graph, _ = capture(step)
    return partial(_replay, graph, step)


def _replay(graph: torch.cuda.CUDAGraph, step: Callable[[], object]) -> None:
    graph.replay()


def random_bytes(batch: int, length: int, device: torch.device) -> Tensor:
    """Ids `[B, T]`, the same every time."""
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
