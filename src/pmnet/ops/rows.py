"""What is computed row by row: RMSNorm, the rotary rotation of heads, the gate of the MLP.

Shapes: B, T, D width of a row, H heads, E width of a head.
"""

from typing import Any

import torch
from torch import Tensor

from pmnet.ops.backend import plain, runs_native
from pmnet.ops.native import dense_like, kernels, pointers

_BLOCK = 64  # rows whose weight gradients are summed in turn, whatever the number of threads


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` in the dtype of its weight, so that autocast does not compute it in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`, in the dtype of the weight."""
        x = x.to(self.weight.dtype)
        fits = runs_native(x, self.weight) and x.shape[-1:] == self.weight.shape
        return _rms_norm(x, self.weight, _eps(self)) if fits else super().forward(x)


def _eps(norm: RMSNorm) -> float:
    """As PyTorch takes it: None is the distance from 1 to the next float32."""
    return torch.finfo(torch.float32).eps if norm.eps is None else norm.eps


def norm_rotate(x: Tensor, norm: torch.nn.Module, cos: Tensor, sin: Tensor) -> Tensor:
    """RMSNorm of every head, then its rotary rotation in at least float32.

    Args:
        x: `[B, T, H, E]`.
        norm: over E; one with hooks, and any other module, is called.
        cos, sin: of the angles, `[B or 1, T, 1, E]`; element j turns together with element `j + E/2`.

    Returns:
        `[B, T, H, E]`.

    Raises:
        ValueError: if the shapes do not agree.
    """
    wide = cos.shape[0], x.shape[1], 1, x.shape[3]
    if not (cos.shape == sin.shape == wide and cos.shape[0] in (1, x.shape[0])):
        found = f"{list(x.shape)}, {list(cos.shape)}, {list(sin.shape)}"
        raise ValueError(f"norm_rotate: expected x [B, T, H, E], cos and sin [B or 1, T, 1, E], got {found}")
    if (
        type(norm) is RMSNorm
        and plain(norm)
        and runs_native(x, norm.weight, cos, sin)
        and norm.weight.shape == wide[3:]
    ):
        return _norm_rotate(x, norm.weight, cos, sin, _eps(norm))
    x = norm(x)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def rotary_table(positions: Tensor, width: int, theta: float, like: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary angles of integer positions.

    Angles are computed in float64 and only cos and sin are rounded, so position 1e7 is as exact as position 1.

    Args:
        positions: int64, `[B or 1, T]`.
        width: E.
        theta: base of the frequencies.
        like: activations; the table is float64 if they are, float32 otherwise.

    Returns:
        Cosines and sines, `[B or 1, T, 1, E]` each.
    """
    table = _rotary_table(positions.long(), width, theta, like.dtype == torch.float64, runs_native(like)).unsqueeze(3)
    return table[0], table[1]


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """`silu(gate) * up`, elementwise.

    silu is spelled with tanh: torch's own differs in the last bit at the end of a vectorised run, and so would depend
    on how the stream is cut into chunks.
    """
    if runs_native(gate, up) and gate.shape == up.shape:
        return _silu_product(gate, up)
    wide = gate if gate.dtype == torch.float64 else gate.float()
    return (0.5 * wide * (1 + torch.tanh(0.5 * wide))).to(gate.dtype) * up


@torch.library.custom_op("pmnet::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x, weight = x.contiguous(), weight.contiguous()
    out = torch.empty_like(x)
    width = x.shape[-1]
    kernels().rms_norm(*pointers(x, weight, out), x.numel() // width, width, eps)
    return out


@torch.library.custom_op("pmnet::rms_norm_backward", mutates_args=())
def _rms_norm_backward(x: Tensor, weight: Tensor, upstream: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x, weight, upstream = x.contiguous(), weight.contiguous(), upstream.contiguous()
    width, rows = x.shape[-1], x.numel() // x.shape[-1]
    grad, parts = torch.empty_like(x), x.new_zeros(-(-rows // _BLOCK), width)
    kernels().rms_norm_backward(*pointers(x, weight, upstream, grad, parts), rows, width, _BLOCK, eps)
    return grad, parts.sum(0)


@torch.library.custom_op("pmnet::norm_rotate", mutates_args=())
def _norm_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, eps: float) -> Tensor:
    x, weight, cos, sin = (tensor.contiguous() for tensor in (x, weight, cos, sin))
    out = torch.empty_like(x)
    positions, heads, width = x.shape[0] * x.shape[1], *x.shape[2:]
    sizes = positions, cos.numel() // width, heads, width
    kernels().norm_rotate(*pointers(x, weight, cos, sin, out), *sizes, eps)
    return out


@torch.library.custom_op("pmnet::norm_rotate_backward", mutates_args=())
def _norm_rotate_backward(
    x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor, upstream: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    x, weight, cos, sin, upstream = (tensor.contiguous() for tensor in (x, weight, cos, sin, upstream))
    positions, heads, width = x.shape[0] * x.shape[1], *x.shape[2:]
    grad, parts = torch.empty_like(x), x.new_zeros(-(-positions // _BLOCK), width)
    sizes = positions, cos.numel() // width, heads, width
    kernels().norm_rotate_backward(*pointers(x, weight, cos, sin, upstream, grad, parts), *sizes, _BLOCK, eps)
    return grad, parts.sum(0)


@torch.library.custom_op("pmnet::rotary_table", mutates_args=())
def _rotary_table(positions: Tensor, width: int, theta: float, double: bool, natively: bool) -> Tensor:
    """`[2, B or 1, T, E]`; one operator, lest a compiler repeats it in every use."""
    if natively:
        positions = positions.contiguous()
        table = positions.new_empty(2, *positions.shape, width, dtype=torch.float32)
        kernels().rotary_table(*pointers(positions, *table), positions.numel(), width, theta)
        return table
    exponents = torch.arange(0, width, 2, dtype=torch.float64, device=positions.device) / width
    angles = positions.double().unsqueeze(-1) * theta**-exponents
    angles = torch.cat([angles, angles], dim=-1)
    table = torch.stack([angles.cos(), angles.sin()])
    return table if double else table.float()


@_rotary_table.register_fake
def _(positions: Tensor, width: int, theta: float, double: bool, natively: bool) -> Tensor:
    return positions.new_empty(2, *positions.shape, width, dtype=torch.float64 if double else torch.float32)


@torch.library.custom_op("pmnet::silu_product", mutates_args=())
def _silu_product(gate: Tensor, up: Tensor) -> Tensor:
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    kernels().silu_product(*pointers(gate, up, out), gate.numel())
    return out


@torch.library.custom_op("pmnet::silu_product_backward", mutates_args=())
def _silu_product_backward(gate: Tensor, up: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    gate, up, upstream = gate.contiguous(), up.contiguous(), upstream.contiguous()
    grads = torch.empty_like(gate), torch.empty_like(up)
    kernels().silu_product_backward(*pointers(gate, up, upstream, *grads), gate.numel())
    return grads


for _forward in (_rms_norm, _norm_rotate, _silu_product):
    _forward.register_fake(dense_like)
for _backward in (_rms_norm_backward, _norm_rotate_backward, _silu_product_backward):
    _backward.register_fake(lambda x, other, *_: (dense_like(x), dense_like(other)))


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    tensors = [value for value in inputs if isinstance(value, Tensor)]
    ctx.save_for_backward(*tensors)
    ctx.rest = inputs[len(tensors) :]


_rms_norm.register_autograd(
    lambda ctx, upstream: (*_rms_norm_backward(*ctx.saved_tensors, upstream, *ctx.rest), None), setup_context=_save
)
_norm_rotate.register_autograd(
    lambda ctx, upstream: (*_norm_rotate_backward(*ctx.saved_tensors, upstream, *ctx.rest), None, None, None),
    setup_context=_save,
)
_silu_product.register_autograd(
    lambda ctx, upstream: _silu_product_backward(*ctx.saved_tensors, upstream), setup_context=_save
)
