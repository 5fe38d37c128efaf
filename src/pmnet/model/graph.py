"""Decoding on a GPU as one CUDA graph per byte.

Shapes: B streams, V vocabulary.
"""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from pmnet.model.cache import PMNetCache
from pmnet.model.decode_step import DecodeStep
from pmnet.model.modeling import PMNetForCausalLM

Result = TypeVar("Result")


def capture(step: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """A CUDA graph of `step`, after a warm-up on a stream of its own, and what the step returns in it.

    The graph reads and writes the tensors that `step` holds: they must be kept for as long as it is replayed.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = step()
    return graph, result


class DecodeGraph:
    """A decode step, compiled and captured once, then replayed: a byte of all streams costs a single launch.

    It has a state of its own, a copy of the one it was made with; the memory needs no more room as it goes on.

    Args:
        model: in eval mode, on a CUDA device; its weights may change in place, not be replaced.
        cache: state of B streams that have read something.

    Raises:
        ValueError: if the model trains, is not on a CUDA device, or the streams have read nothing.
    """

    @torch.no_grad()
    def __init__(self, model: PMNetForCausalLM, cache: PMNetCache):
        if model.training or model.device.type != "cuda" or not cache.columns:
            mode = "in training" if model.training else "in eval mode"
            raise ValueError(
                "a DecodeGraph needs a model in eval mode on a CUDA device and streams that have read something, got "
                f"one {mode} on {model.device} and {cache.columns} columns"
            )
        # narrow products become sums that are fused with what stands before and behind them
        options: dict[str, str | int | bool | Callable[..., object]] = {"coordinate_descent_tuning": True}
        step = torch.compile(DecodeStep(model), fullgraph=True, dynamic=False, options=options)
        self._config, self._columns = model.config, cache.columns
        self._state = [tensor.clone() for tensor in cache.tensors()]
        self._ids = torch.zeros(cache.seen.shape[0], 1, dtype=torch.int64, device=model.device)

        def advance() -> Tensor:
            logits, after = step(self._ids, self._state)
            self._store(after)
            return logits

        with torch.cuda.device(model.device):
            self._graph, self._logits = capture(advance)
        self._store(cache.tensors())  # what the warm-up read is forgotten

    def _store(self, state: list[Tensor]) -> None:
        for dtype in {tensor.dtype for tensor in state}:  # one launch for all tensors of a kind
            chosen = [i for i, tensor in enumerate(state) if tensor.dtype == dtype]
            torch._foreach_copy_([self._state[i] for i in chosen], [state[i] for i in chosen])

    def __call__(self, ids: Tensor) -> Tensor:
        """Read one id per stream.

        Args:
            ids: `[B, 1]`, on the device of the model.

        Returns:
            Next-token logits `[B, 1, V]`, until the next call overwrites them.
        """
        self._ids.copy_(ids)
        self._graph.replay()
        self._columns += 1
        return self._logits

    def cache(self) -> PMNetCache:
        """A copy of the state."""
        return PMNetCache.from_tensors(self._config, [tensor.clone() for tensor in self._state], self._columns)


__all__ = ["DecodeGraph", "capture"]
