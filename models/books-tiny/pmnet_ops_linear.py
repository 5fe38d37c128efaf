"""A linear map whose rows do not depend on how many rows there are.

Matrix libraries pick another summation order for few rows (a vector product) and, with several threads, for deep
and narrow products (the inner dimension is split between threads), and another one on another processor. Any of these
would make a byte's result depend on how the stream is cut into chunks, on its batch neighbours or on the machine. In
float32 on the CPU a product is therefore computed by a native kernel that cuts it into depths of at most `MAX_DEPTH`,
each summed by fused multiply-adds from zero; the partial sums are added in turn, the bias last.

Without the native kernels, and in float64, the library is asked for products of at least `MIN_ROWS` rows, at most
`MAX_DEPTH` inputs, and whole multiples of 16, which is as much as can be done; `tests/test_exactness.py` checks the
machine at hand.
"""

from typing import Any

import re

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .pmnet_ops_backend import direct, runs_native
from .pmnet_ops_native import kernels, pointers

MIN_ROWS = 16
MAX_DEPTH = 384
_MULTIPLE = 16  # of outputs and inputs: for odd ones, some libraries have another order


def row_stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, with rows that do not depend on their number (float32 and float64 on the CPU).

    Args:
        x: input `[..., K]`, any number of leading dimensions; cast to the dtype of `weight`.
        weight: `[O, K]`.
        bias: optional `[O]`.

    Returns:
        `[..., O]`. In half precision, on other devices and for a weight of a class of its own (quantised, sharded) this
        is `torch.nn.functional.linear`.

    Raises:
        ValueError: if the input is not K wide, or the bias not O.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"a linear map of {weight.shape[1]} inputs got {tuple(x.shape)}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"a linear map of {weight.shape[0]} outputs got a bias of {tuple(bias.shape)}")
    x = x.to(weight.dtype)
    if _fuses(x, weight):
        return _fused_row(x, weight, bias)
    if x.device.type != "cpu" or weight.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu") or wrapped(weight):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # an operator of our own costs more than a product of one row
    out = products(rows, weight, bias) if direct(x, weight, bias) else _linear(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_of_heads(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A linear map for each head.

    Args:
        x: `[B, T, R, K]`.
        weight, bias: heads outer, `[R * O, K]` and `[R * O]`.

    Returns:
        `[B, T, R * O]`, each head as by `row_stable_linear`.
    """
    heads = x.shape[2]
    if _fuses(x[:, :, 0], weight):
        by_head = weight.to(x.dtype).unflatten(0, (heads, -1))
        return _fused_row(x, by_head, bias.view(heads, -1)).flatten(2)
    parts = zip(weight.chunk(heads), bias.chunk(heads), strict=True)
    return torch.cat([row_stable_linear(x[:, :, r], *part) for r, part in enumerate(parts)], dim=-1)


def _fuses(x: Tensor, weight: Tensor) -> bool:
    """Whether `x` is one row in code that is compiled for a GPU, where a sum is fused with its neighbours."""
    one = x.device.type == "cuda" and x.numel() == x.shape[-1]
    return one and torch.compiler.is_compiling() and not wrapped(weight)


def _fused_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`x @ weight.T + bias` as sums, in at least float32."""
    wide = torch.promote_types(x.dtype, torch.float32)
    out = (x.unsqueeze(-2).to(wide) * weight.to(wide)).sum(-1)
    return (out if bias is None else out + bias).to(x.dtype)


def products(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` for `[S, K]`, summed in the order described above; not differentiable.

    `out`, if given, receives the result: `[S, O]`, its rows may lie apart.
    """
    count = rows.shape[0]
    if runs_native(rows, weight, bias):
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        weight, bias = weight.contiguous(), None if bias is None else bias.contiguous()
        out = rows.new_empty(count, weight.shape[0]) if out is None else out
        kernels().linear(
            rows.data_ptr(), rows.stride(0), *pointers(weight, None, bias, out), out.stride(0), count,
            rows.shape[1], weight.shape[0],
        )  # fmt: skip
        return out
    more_outputs, more_inputs = (-size % _MULTIPLE for size in weight.shape)
    if count < MIN_ROWS or more_outputs or more_inputs:
        rows = F.pad(rows, (0, more_inputs, 0, max(0, MIN_ROWS - count)))
        wider = F.pad(weight, (0, more_inputs, 0, more_outputs))
        found = products(rows, wider, None if bias is None else F.pad(bias, (0, more_outputs)))
        found = found[:count, : weight.shape[0]]
        return found.contiguous() if out is None else out.copy_(found)
    if out is None:
        out = rows.new_empty(count, weight.shape[0])
    step = depth_of(rows.shape[1])
    first = rows[:, :step], weight[:, :step].t()
    if bias is not None and step >= rows.shape[1]:
        return torch.addmm(bias, *first, out=out)
    torch.mm(*first, out=out)
    for depth in range(step, rows.shape[1], step):
        part = slice(depth, depth + step)
        out.addmm_(rows[:, part], weight[:, part].t())
    return out if bias is None else out.add_(bias)


def depth_of(inputs: int) -> int:
    """Summands of one pass: the fewest passes of at most `MAX_DEPTH`, evenly long, in multiples of 16."""
    passes = -(-inputs // MAX_DEPTH)
    return -(-inputs // (16 * passes)) * 16


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::linear", mutates_args=())
def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return products(rows, weight, bias)


@_linear.register_fake
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
    ctx.save_for_backward(inputs[0], inputs[1])
    ctx.has_bias = inputs[2] is not None


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    rows, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    return (
        upstream @ weight if wanted[0] else None,
        upstream.t() @ rows if wanted[1] else None,
        upstream.sum(0) if wanted[2] and ctx.has_bias else None,
    )


_linear.register_autograd(_gradient, setup_context=_save)


def wrapped(weight: Tensor) -> bool:
    """Whether a weight is of a class of its own, around other tensors: quantised or sharded by another library."""
    return type(weight) is not torch.nn.Parameter and is_traceable_wrapper_subclass(weight)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` computed by `row_stable_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return row_stable_linear(input, self.weight, self.bias)
