"""Row gathers with one index per batch entry."""

from typing import Any

import re

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


def sum_rows(rows: Tensor, index: Tensor, count: int) -> Tensor:
    """Row g of the result is the sum of the rows whose index is g, by a product with the one-hot index.

    Adding rows one by one (with atomics where it is parallel) is slow when many share few places, and different from
    run to run.

    Args:
        rows: `[I, C]`.
        index: int64 in `[0, count)`, any shape of I entries.
        count: G.

    Returns:
        `[G, C]`.
    """
    chosen = torch.arange(count, device=index.device).unsqueeze(1) == index.flatten()
    return chosen.to(rows.dtype) @ rows


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::lookup", mutates_args=())
def lookup(table: Tensor, index: Tensor) -> Tensor:
    """Rows `table[index]` of a small table, whose gradient is a matrix product (`sum_rows`).

    Args:
        table: `[G, C]`.
        index: int64 in `[0, G)`, any shape.

    Returns:
        `[*index.shape, C]`.
    """
    return table.index_select(0, index.flatten()).view(*index.shape, table.shape[1])


@lookup.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty(*index.shape, table.shape[1])


def _save_index(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])
    ctx.groups = inputs[0].shape[0]


def _gradient_of_table(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
    (index,) = ctx.saved_tensors
    return sum_rows(upstream.flatten(0, -2), index, ctx.groups), None


lookup.register_autograd(_gradient_of_table, setup_context=_save_index)
