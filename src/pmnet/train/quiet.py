"""Quiet filler: an auxiliary loss that teaches the leaves of a memory to turn nothing for bytes that nobody asks for.

A constant rotation of 1e-6 radians a byte is a whole radian after a million bytes. What stays below the dead zone of
`phase_bits` (docs/model.md) is exactly nothing instead, however long the filler. The root may turn: it does so from
the first bytes on, and training sees where that leads; what turns slowly below it, training never does.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmnet.baselines import Carry
from pmnet.data.tasks import filler_columns
from pmnet.memory import MemoryWrite
from pmnet.ops import to_angle
from pmnet.train.tasks import Batch

Objective = Callable[[PreTrainedModel, Batch, Carry | None], tuple[Tensor, Tensor]]


def quieted(objective: Objective, weight: float) -> Objective:
    """The objective, and `weight` times the mean |theta| in radians of filler, summed over levels below the root."""

    def total(model: PreTrainedModel, batch: Batch, carry: Carry | None = None) -> tuple[Tensor, Tensor]:
        with rotations(model) as found:
            loss, correct = objective(model, batch, carry)
        filler = filler_columns(batch["input_ids"])
        turned = torch.stack([(theta.abs().mean(2) * filler).sum() for theta in found[1:]])
        return loss + weight * turned.sum() / filler.sum().clamp(min=1), correct

    return total


@contextmanager
def rotations(model: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Fills a list with theta of every level, radians `[B, T, M]`, of the one call of the model that is made inside."""
    found: list[Tensor] = []
    hooks = [
        module.proj_out.register_forward_hook(lambda _, inputs, raw: found.append(to_angle(raw.float())))
        for module in model.modules()
        if isinstance(module, MemoryWrite)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()
