"""A linear map whose rows do not depend on how many rows there are.

Matrix libraries pick another summation order for few rows (a vector product) and, with several threads, for deep
and narrow products (the inner dimension is split between threads). Either would make a byte's result depend on how
the stream is cut into chunks and on its batch neighbours. In float32 on the CPU a product is therefore cut into depths
of at most `MAX_DEPTH`, each summed by fused multiply-adds from zero; the partial sums are added in turn, the bias last.
The library does just that for `MIN_ROWS` rows and more; fewer rows are computed by the native kernel, which reads the
weights once, or, where the library turns out to sum in another order, padded to `MIN_ROWS`. `tests/test_exactness.py`
checks the machine at hand.
"""

from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .pmnet_ops_backend import direct, native
from .pmnet_ops_native import kernels, pointers

MIN_ROWS = 16
MAX_DEPTH = 384


def row_stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, with rows that do not depend on their number (float32 and float64 on the CPU).

    Args:
        x: input `[..., K]`, any number of leading dimensions; cast to the dtype of `weight`.
        weight: `[O, K]`.
        bias: optional `[O]`.

    Returns:
        `[..., O]`. In half precision and on other devices this is `torch.nn.functional.linear`.

    Raises:
        ValueError: if the input is not K wide.
    """
    if x.shape[-1:] != weight.shape[1:]:
        raise ValueError(f"a linear map of {weight.shape[1]} inputs got {tuple(x.shape)}")
    x = x.to(weight.dtype)
    if x.device.type != "cpu" or weight.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    # an operator of our own costs more than a product of one row
    out = products(rows, weight, bias) if direct(x) else _linear(rows, weight, bias)
    return out.view(*x.shape[:-1], weight.shape[0])


def products(rows: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """`rows @ weight.T + bias` for `[S, K]`, summed in the order described above; not differentiable.

    `out`, if given, receives the result: `[S, O]`, its rows may lie apart.
    """
    count = rows.shape[0]
    if 1 in weight.shape and count >= MIN_ROWS:  # the library would take it for a product of vectors
        outputs, depth = (int(size == 1) for size in weight.shape)
        wider = F.pad(weight, (0, depth, 0, outputs)), None if bias is None else F.pad(bias, (0, outputs))
        found = products(F.pad(rows, (0, depth)), *wider)[:, : weight.shape[0]]
        return found.contiguous() if out is None else out.copy_(found)
    if count < MIN_ROWS:
        if native(rows, weight, bias) and library_sums_in_order():
            found = _few_rows(rows, weight, bias)
        else:
            found = products(F.pad(rows, (0, 0, 0, MIN_ROWS - count)), weight, bias)[:count]
        return found if out is None else out.copy_(found)
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


def _few_rows(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows, weight, bias = rows.contiguous(), weight.contiguous(), None if bias is None else bias.contiguous()
    out = rows.new_empty(rows.shape[0], weight.shape[0])
    kernels().linear_few_rows(*pointers(rows, weight, None, bias, out), *rows.shape, weight.shape[0])
    return out


@cache
def library_sums_in_order() -> bool:
    """Whether the matrix library's products of many rows have the bits of the native kernel's."""
    draw = partial(torch.randn, generator=torch.Generator().manual_seed(0), dtype=torch.float32, device="cpu")
    for depth, outputs, count in ((384, 64, 16), (200, 130, 48), (64, 256, 300), (13, 7, 33)):
        rows, weight = (draw(n, depth) for n in (count, outputs))
        bias = draw(outputs)
        if not torch.equal(F.linear(rows, weight, bias)[-3:], _few_rows(rows[-3:], weight, bias)):
            return False
    return True


@torch.library.custom_op(__name__.replace(".", "_") + "::linear", mutates_args=())
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


def plain(module: torch.nn.Module) -> bool:
    """Whether calling a module is nothing but the `forward` of its class: no hook, nothing put in its place."""
    own = module.__dict__  # attributes of a module are slow, and every step asks
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own)


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` computed by `row_stable_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return row_stable_linear(input, self.weight, self.bias)
