"""What each level of the memory writes and reads, column by column, in one call of a model.

Shapes: B sequences, T columns, N slots, M phases, R read heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pmnet.memory import MemoryRead, MemoryWrite
from pmnet.model import PMNetForCausalLM
from pmnet.ops import address, to_angle, to_turns

Trace = tuple[dict[str, Tensor], list[Tensor]]


@contextmanager
def traced(model: PMNetForCausalLM) -> Iterator[list[Trace]]:
    """Fills a list with what each level does with each column of the one call that is made inside, level by level.

    Of its write: group and slot `[B, T]`, weights of the slots `[B, T, N]`, theta in radians `[B, T, M]`, share of
    rotations that are not zero, `[B, T]`. Of each of its reads: the slot that a head looks at most, `[B, T, R]`.
    """
    found: list[Trace] = []
    bits = model.config.phase_bits

    def wrote(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, MemoryWrite)
        hidden, visit, anchors = inputs[:3]
        weights, raw = module.propose(hidden, visit, anchors)
        theta = to_angle(raw)
        turns = to_turns(weights.unsqueeze(-1) * theta.unsqueeze(2), bits)
        found.append(({"group": visit.groups, "slot": weights.argmax(2), "weights": weights, "theta": theta,
                       "turned": (turns != 0).float().mean((2, 3))}, []))  # fmt: skip

    def read(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, MemoryRead)
        hidden, geometry = inputs
        query = module.proj_q(module.norm(hidden)).unflatten(-1, (module.heads, module.size))
        weight, bias = (tensor.chunk(2)[0] for tensor in (module.proj_kv.weight, module.proj_kv.bias))
        keys = nn.functional.linear(geometry.to(weight.dtype), weight, bias).unflatten(-1, (module.heads, module.size))
        found[-1][1].append(address(query, keys).argmax(2))

    hooks = [
        module.register_forward_hook(wrote if isinstance(module, MemoryWrite) else read)
        for module in model.modules()
        if isinstance(module, MemoryWrite | MemoryRead)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def spread_of_writes(write: dict[str, Tensor]) -> dict[str, float]:
    """Whether the writes of a level say anything, from its trace.

    Returns:
        `theta`: mean |theta| in radians; `constant`: the part of it that is the same at every column, |mean over
        columns| as a share of it; `slots_written` and `groups_visited`: over how many slots a column's write is
        spread, and all columns over groups, as the exponential of the entropy.
    """
    weights, theta, size = write["weights"].double(), write["theta"].double(), float(write["theta"].abs().mean())
    return {
        "theta": size,
        "constant": float(theta.mean(1).abs().mean()) / size if size else 0.0,
        "slots_written": float(torch.special.entr(weights).sum(2).exp().mean()),
        "groups_visited": effective(write["group"]),
    }


def effective(groups: Tensor) -> float:
    """Number of groups that as evenly visited ones would have the same entropy."""
    share = torch.bincount(groups.flatten()).double() / groups.numel()
    return float(torch.special.entr(share).sum().exp())
