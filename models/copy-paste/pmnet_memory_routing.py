"""Route: which group of each level a position visits, and what is handed down to it (docs/model.md, write).

Shapes: B, T, D hidden size, N slots, M phases.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Visit(NamedTuple):
    """What a position carries through the tree."""

    groups: Tensor  # [B, T] group to visit on this level
    field: Tensor | None  # [B, T, N, M] radians handed down from the levels above; None above the root


def enter(hidden: Tensor) -> Visit:
    """The visit to the root of positions with hidden states `[B, T, D]`: group 0, nothing from above."""
    return Visit(torch.zeros(hidden.shape[:2], dtype=torch.int64, device=hidden.device), None)


def hand_down(visit: Visit, weights: Tensor, state: Tensor) -> Visit:
    """The visit to the next level: the child group `N * g + argmax_n p_n` (hard top-1), this level's state added.

    Args:
        visit: to this level.
        weights: p of the slots, `[B, T, N]`.
        state: of the visited group right after the position's write, radians `[B, T, N, M]`.
    """
    child = weights.shape[2] * visit.groups + weights.argmax(dim=2)
    return Visit(child, state if visit.field is None else visit.field + state)
