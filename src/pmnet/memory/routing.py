"""Where: how a position finds its slots and its next group (DESIGN section 1, steps 2 and 3).

Shapes: B, T, N slots, M phases. Angles are radians, float32 (float64 in a float64 model), never half precision.
"""

import math

import torch
from torch import Tensor

from pmnet.ops import lookup


def to_angle(x: Tensor) -> Tensor:
    """`pi * tanh(x)`, radians in `(-pi, pi)`, at least float32."""
    return math.pi * torch.tanh(x if x.dtype == torch.float64 else x.float())


def visited_anchors(anchors: Tensor, groups: Tensor) -> Tensor:
    """Anchors `[G, N, M]` of the visited groups `[B, T]`: radians, `[B, T, N, M]`, never half precision."""
    table = anchors.flatten(1)
    rows = lookup(table if table.dtype == torch.float64 else table.float(), groups)
    return rows.view(*groups.shape, *anchors.shape[1:])


def geometry(field: Tensor) -> Tensor:
    """`[sin ; cos]` of a phase field in radians: `[..., M]` to `[..., 2M]`."""
    return torch.cat([torch.sin(field), torch.cos(field)], dim=-1)


def address(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax over the N slots (dim 2) of the phase agreement `sum_m cos(q_m - k_m) / sqrt(M)`.

    Args:
        query: radians, `[B, T, 1, ..., M]`.
        keys: radians, `[B, T, N, ..., M]`.

    Returns:
        Weights that sum to 1 over the slots, `[B, T, N, ...]`.
    """
    scores = torch.cos(query - keys).sum(-1) / math.sqrt(query.shape[-1])
    return scores.softmax(dim=2)


def child_group(weights: Tensor, groups: Tensor) -> Tensor:
    """Hard top-1 route: the group `N * g + argmax_n p_n` on the next level, `[B, T]`."""
    return weights.shape[2] * groups + weights.argmax(dim=2)
