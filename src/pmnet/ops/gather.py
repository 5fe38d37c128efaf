"""Row gathers with one index per batch entry."""

from typing import Any

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Whole rows `x[b, index[b, i]]`.

    Args:
        x: `[B, S, ...]`, any dtype.
        index: int64 in `[0, S)`, `[B, I]`.

    Returns:
        `[B, I, ...]`; differentiable with respect to `x`.
    """
    rows = index + x.shape[1] * torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, *x.shape[2:])


def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows `table[index]` of a small table, whose gradient is a matrix product.

    The usual gradient of a lookup adds rows one by one (with atomics where it is parallel): slow when many positions
    share few rows, and different from run to run. A product with the one-hot index is neither.

    Args:
        table: `[G, C]`.
        index: int64 in `[0, G)`, any shape.

    Returns:
        `[*index.shape, C]`.
    """
    return _Lookup.apply(table, index)


class _Lookup(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.groups = table.shape[0]
        return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        gradient = grads[0].flatten(0, -2)
        chosen = torch.arange(ctx.groups, device=index.device).unsqueeze(1) == index.flatten()
        return chosen.to(gradient.dtype) @ gradient, None
