"""The fused kernels as differentiable operators; `triton` itself is imported when one of them first runs.

Shapes: B, T, N slots, M phases, R read heads, G groups of the level.
"""

from typing import Any

import torch
from torch import Tensor

from pmnet.ops.native import dense_like
from pmnet.ops.scan import plan_segments


def mix_slots(query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor) -> Tensor:
    """`sum_n a_n geometry_n` of `pmnet.ops.read_slots`, `[B, T, R, 2M]`; in half precision under autocast."""
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else key_weight.dtype
    return _read(query, geometry.to(dtype), key_weight.to(dtype), key_bias)[0]


def phase_write(
    weights: Tensor,
    theta: Tensor,
    groups: Tensor,
    memory: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    phase_bits: int,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`pmnet.ops.phase_write` of rotations `weights * theta`, theta in radians, without rotations in memory."""
    plan = plan_segments(groups, memory.shape[1], documents, valid)
    angles, after = _write(
        weights, theta, plan.order, plan.start, plan.end, groups, memory.flatten(2), documents, valid, phase_bits,
        scale_gradient,
    )  # fmt: skip
    return angles.view(*weights.shape, theta.shape[-1]), after.view_as(memory)


def window_attention(query: Tensor, keys: Tensor, values: Tensor, span: Tensor, scaling: float) -> Tensor:
    """`pmnet.ops.window_attention`, in the dtype of the values."""
    return _attention(query.to(values.dtype), keys.to(values.dtype), values, span, scaling)[0]


@torch.library.custom_op("pmnet::triton_attention", mutates_args=())
def _attention(query: Tensor, keys: Tensor, values: Tensor, span: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    from pmnet.ops.triton.attention import attention_forward

    return attention_forward(query, keys, values, span, scaling)


@torch.library.custom_op("pmnet::triton_attention_backward", mutates_args=())
def _attention_backward(
    upstream: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Tensor,
    out: Tensor,
    softmax: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    from pmnet.ops.triton.attention import attention_backward

    return attention_backward(upstream, query, keys, values, span, out, softmax, scaling)


@torch.library.custom_op("pmnet::triton_read", mutates_args=())
def _read(query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    from pmnet.ops.triton.read import read_forward

    return read_forward(query, geometry, key_weight, key_bias)


@torch.library.custom_op("pmnet::triton_read_backward", mutates_args=())
def _read_backward(
    upstream: Tensor, query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor, attention: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from pmnet.ops.triton.read_gradient import read_backward

    return read_backward(upstream, query, geometry, key_weight, key_bias, attention)


@torch.library.custom_op("pmnet::triton_write", mutates_args=())
def _write(
    weights: Tensor,
    theta: Tensor,
    order: Tensor,
    start: Tensor,
    end: Tensor,
    groups: Tensor,
    memory: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    phase_bits: int,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor]:
    from pmnet.ops.triton.scan import write_states

    return write_states(weights, theta, order, start, groups, memory, documents, valid, phase_bits)


@torch.library.custom_op("pmnet::triton_write_backward", mutates_args=())
def _write_backward(
    upstream: Tensor, weights: Tensor, theta: Tensor, order: Tensor, start: Tensor, end: Tensor, scale_gradient: bool
) -> tuple[Tensor, Tensor]:
    from pmnet.ops.triton.scan_gradient import write_gradient

    return write_gradient(upstream, weights, theta, order, start, end, scale_gradient)


@_read.register_fake
def _(query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    slots, width = geometry.shape[2:]
    attention = geometry.new_empty(batch, length, slots, heads, dtype=torch.float32)
    return geometry.new_empty(batch, length, heads, width), attention


@_attention.register_fake
def _(query: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, heads, _ = query.shape
    return dense_like(query), query.new_empty(batch, heads, 2, length, dtype=torch.float32)


@_write.register_fake
def _(weights: Tensor, theta: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    batch, length, slots = weights.shape
    return weights.new_empty(batch, length, slots * theta.shape[-1]), dense_like(rest[4])


_read_backward.register_fake(lambda upstream, *inputs: tuple(dense_like(x) for x in inputs[:4]))
_attention_backward.register_fake(lambda upstream, *inputs: tuple(dense_like(x) for x in inputs[:3]))
_write_backward.register_fake(lambda upstream, weights, theta, *_: (dense_like(weights), dense_like(theta)))


def _save_attention(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors, *output)


def _save_read(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _save_write(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:5])
    ctx.scale_gradient = inputs[-1]


_attention.register_autograd(
    lambda ctx, upstream, _: (*_attention_backward(upstream, *ctx.saved_tensors, ctx.scaling), None, None),
    setup_context=_save_attention,
)
_read.register_autograd(
    lambda ctx, upstream, _: _read_backward(upstream.contiguous(), *ctx.saved_tensors), setup_context=_save_read
)
_write.register_autograd(
    lambda ctx, upstream, _: (*_write_backward(upstream, *ctx.saved_tensors, ctx.scale_gradient), *[None] * 9),
    setup_context=_save_write,
)
