"""Agreement of phases, and reading slots by it (docs/model.md, write and read).

Shapes: B, T, R read heads, N slots, M phases, G groups. A *raw* value x stands for the angle `pi * tanh(x)` in radians.
Angles are float32 (float64 in a float64 model), never half precision.
"""

import math
from collections.abc import Iterator
from typing import Any

import re

import torch
from torch import Tensor

from . import pmnet_ops_backend as backend
from .pmnet_ops_gather import lookup, sum_rows
from .pmnet_ops_linear import linear_of_heads, products, row_stable_linear
from .pmnet_ops_native import check_range, dense_like, kernels, pointers

MOST_SLOTS = 1024  # of the native kernels
_BLOCK = 2**19  # keys computed at a time when slots are read: they stay in the processor's cache
_MANY = 1024  # positions that keep a GPU busy in the fused read; for fewer, matrix products spread better
_ROWS = 1024  # or so many rows of them: with fewer, the matrix library is slow


def to_angle(raw: Tensor) -> Tensor:
    """`pi * tanh(raw)`, radians in `(-pi, pi)`, at least float32."""
    return math.pi * torch.tanh(raw if raw.dtype == torch.float64 else raw.float())


def address(query: Tensor, keys: Tensor) -> Tensor:
    """Softmax over the slots of the phase agreement `sum_m cos(q_m - k_m) / sqrt(M)`.

    Args:
        query: raw, `[B, T, R, M]`.
        keys: raw, `[B, T, N, R, M]`.

    Returns:
        Weights that sum to 1 over the slots, `[B, T, N, R]`.
    """
    alike = keys.shape[:2] + keys.shape[3:] == query.shape
    if backend.runs_native(query, keys) and alike and keys.shape[2] <= MOST_SLOTS:
        return _address(query, keys)
    difference = to_angle(query).unsqueeze(2) - to_angle(keys)
    scores = torch.cos(difference).sum(-1) / math.sqrt(query.shape[-1])
    # over the last dimension: over another, the bits of some processors depend on the number of positions
    return scores.transpose(2, 3).softmax(dim=-1).transpose(2, 3)


def geometry(field: Tensor | None, anchors: Tensor, groups: Tensor) -> Tensor:
    """`[sin ; cos]` of a phase field turned by the anchors of the visited groups.

    Args:
        field: radians, `[B, T, N, M]`; None is zero.
        anchors: radians, `[G, N, M]`.
        groups: int64 in `[0, G)`, `[B, T]`.

    Returns:
        `[B, T, N, 2M]`, never half precision.
    """
    whole = field is None or field.shape == groups.shape + anchors.shape[1:]
    if backend.runs_native(anchors, field) and whole and groups.dtype == torch.int64:
        return _geometry(field, anchors, groups)
    table = anchors.flatten(1)
    rows = lookup(table if table.dtype == torch.float64 else table.float(), groups)
    phi = rows.view(*groups.shape, *anchors.shape[1:])
    phi = phi if field is None else field + phi
    return torch.cat([torch.sin(phi), torch.cos(phi)], dim=-1)


def read_slots(query: Tensor, geometry: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """What each read head sees: values of the slots, weighted by the agreement of their keys with the query.

    Keys and values are linear in the geometry, `[k ; v] = W geometry + b`, keys raw. Slots are mixed before values are
    projected: `sum_n a_n (W_v geo_n + b_v) = W_v (sum_n a_n geo_n) + b_v`.

    Args:
        query: raw, `[B, T, R, M]`.
        geometry: `[B, T, N, 2M]`.
        weight, bias: keys first, then values, heads outer: `[2 * R * M, 2M]`, `[2 * R * M]`.

    Returns:
        `[B, T, R * M]`.

    Raises:
        ValueError: if shapes do not agree.
    """
    heads, outputs = query.shape[2:], 2 * query.shape[2:].numel()
    if geometry.shape[:2] != query.shape[:2] or weight.shape != (outputs, geometry.shape[-1]) or len(bias) != outputs:
        raise ValueError(
            "read_slots: expected query [B, T, R, M], geometry [B, T, N, 2M], weight [2RM, 2M], bias [2RM], got "
            f"{tuple(query.shape)}, {tuple(geometry.shape)}, {tuple(weight.shape)}, {tuple(bias.shape)}"
        )
    if geometry.dtype.itemsize < 4:  # cast on the way by a wrapper: angles are never computed in half precision
        geometry = geometry.float()
    if backend.runs_native(query, geometry, weight, bias) and geometry.shape[2] <= MOST_SLOTS:
        return _read_slots(query, geometry, weight, bias)[0]
    key_weight, value_weight = weight.chunk(2)
    key_bias, value_bias = bias.chunk(2)
    if backend.runs_triton(query, query.shape[:2].numel() >= _MANY) and geometry.dtype == torch.float32:
        from .pmnet_ops_triton import operators

        mixed = operators.mix_slots(query, geometry, key_weight, key_bias)
    else:
        weights = address(query, row_stable_linear(geometry, key_weight, key_bias).unflatten(-1, heads))
        mixed = torch.bmm(weights.transpose(2, 3).flatten(0, 1), geometry.flatten(0, 1))
        mixed = mixed.view(*query.shape[:3], geometry.shape[3])
    return linear_of_heads(mixed, value_weight, value_bias)


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::address", mutates_args=())
def _address(query: Tensor, keys: Tensor) -> Tensor:
    query, keys = query.contiguous(), keys.contiguous()
    batch, length, slots, heads, size = keys.shape
    weights = query.new_empty(batch, length, slots, heads)
    kernels().address(*pointers(query, keys, weights), batch * length, slots, heads, size)
    return weights


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::address_backward", mutates_args=())
def _address_backward(query: Tensor, keys: Tensor, weights: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    query, keys, upstream = query.contiguous(), keys.contiguous(), upstream.contiguous()
    batch, length, slots, heads, size = keys.shape
    grads = torch.empty_like(query), torch.empty_like(keys)
    kernels().address_backward(
        *pointers(query, keys, None, weights, upstream, *grads), batch * length, slots, heads, size
    )
    return grads


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::geometry", mutates_args=())
def _geometry(field: Tensor | None, anchors: Tensor, groups: Tensor) -> Tensor:
    check_range("groups", groups, anchors.shape[0])
    field = None if field is None else field.contiguous()
    anchors, groups = anchors.contiguous(), groups.contiguous()
    slots, size = anchors.shape[1:]
    out = anchors.new_empty(*groups.shape, slots, 2 * size)
    kernels().geometry(*pointers(field, anchors, groups, out), groups.numel(), slots, size)
    return out


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::geometry_backward", mutates_args=())
def _geometry_backward(geometry: Tensor, upstream: Tensor) -> Tensor:
    upstream = upstream.contiguous()
    *leading, width = geometry.shape
    grad = geometry.new_empty(*leading, width // 2)
    kernels().geometry_backward(*pointers(geometry, upstream, grad), geometry.numel() // width, width // 2)
    return grad


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::read_slots", mutates_args=())
def _read_slots(query: Tensor, geometry: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """The result, and the weights of the slots for the gradient. Keys and mixed slots stay in the cache."""
    batch, length, heads, size = query.shape
    slots = geometry.shape[2]
    query, geometry, weight, bias = (tensor.contiguous() for tensor in (query, geometry, weight, bias))
    weights, values = query.new_empty(batch, length, slots, heads), query.new_empty(batch, length, heads * size)
    kernels().read_slots(*pointers(query, geometry, weight, bias, weights, values), batch * length, slots, heads, size)
    return values, weights


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::read_slots_backward", mutates_args=())
def _read_slots_backward(
    query: Tensor, geometry: Tensor, weight: Tensor, bias: Tensor, weights: Tensor, upstream: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keys and mixed slots are computed again, a block of positions at a time, instead of being kept."""
    heads, size = query.shape[2:]
    slots, width = geometry.shape[2:]
    query, geometry, bias, upstream = (tensor.contiguous() for tensor in (query, geometry, bias, upstream))
    grads = torch.empty_like(query), torch.empty_like(geometry)
    grad_weight, grad_bias, wide = weight.new_zeros(weight.shape), torch.zeros_like(bias), heads * size
    for keys, mixed, q, g, a, up, grad_query, grad_geometry in _in_blocks(query, geometry, weights, upstream, *grads):
        count = q.shape[0]
        products(g.view(-1, width), weight[:wide], None, out=keys)
        slopes, grad_mixed = torch.empty_like(a), torch.empty_like(mixed)
        kernels().mix(*pointers(a, g, mixed), count, slots, heads, width)
        for r, part in enumerate(_value_rows(heads, size)):
            up_of_head = up[:, r * size : (r + 1) * size]
            torch.mm(up_of_head, weight[part], out=grad_mixed[:, r])
            grad_weight[part].addmm_(up_of_head.t(), mixed[:, r])
        kernels().mix_backward(*pointers(a, g, grad_mixed, slopes, grad_geometry), count, slots, heads, width)
        kernels().address_backward(
            *pointers(q, keys, bias, a, slopes, grad_query, keys), count, slots, heads, size
        )  # the gradient of the keys takes their place
        grad_geometry.view(-1, width).addmm_(keys, weight[:wide])
        grad_weight[:wide].addmm_(keys.t(), g.view(-1, width))
        grad_bias += torch.cat([keys.sum(0), up.sum(0)])
    return *grads, grad_weight, grad_bias


def _in_blocks(query: Tensor, geometry: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Blocks of positions of tensors `[B, T, ...]`, after room for their keys and mixed slots, the same every time."""
    (heads, size), (slots, width) = query.shape[2:], geometry.shape[2:]
    count = max(16, _ROWS // slots, _BLOCK // (slots * heads * size))
    keys = query.new_empty(min(count, query.shape[:2].numel()) * slots, heads * size)
    mixed = query.new_empty(len(keys) // slots, heads, width)
    for parts in zip(*(x.flatten(0, 1).split(count) for x in (query, geometry, *others)), strict=True):
        positions = parts[0].shape[0]
        yield keys[: positions * slots], mixed[:positions], *parts


def _value_rows(heads: int, size: int) -> list[slice]:
    return [slice((heads + r) * size, (heads + r + 1) * size) for r in range(heads)]


_address.register_fake(lambda query, keys: keys.new_empty(keys.shape[:4]))
_address_backward.register_fake(lambda query, keys, *_: (dense_like(query), dense_like(keys)))
_geometry.register_fake(
    lambda field, anchors, groups: anchors.new_empty(*groups.shape, anchors.shape[1], 2 * anchors.shape[2])
)
_geometry_backward.register_fake(lambda geometry, _: geometry.new_empty(*geometry.shape[:-1], geometry.shape[-1] // 2))
_read_slots.register_fake(
    lambda query, geometry, *_: (
        query.new_empty(*query.shape[:2], query.shape[2] * query.shape[3]),
        query.new_empty(*geometry.shape[:3], query.shape[2]),
    )
)
_read_slots_backward.register_fake(lambda *tensors: tuple(dense_like(tensor) for tensor in tensors[:4]))


def _save_read(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, output[1])


def _save_weights(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs, output)


def _save_geometry(ctx: Any, inputs: tuple[Tensor | None, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(inputs[2], output)
    ctx.has_field, ctx.anchors = inputs[0] is not None, inputs[1].shape


def _gradient_of_phases(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    groups, found = ctx.saved_tensors
    grad = _geometry_backward(found, upstream)
    anchors = sum_rows(grad.flatten(0, 1).flatten(1), groups, ctx.anchors[0]).view(ctx.anchors)
    return grad if ctx.has_field else None, anchors, None


_address.register_autograd(
    lambda ctx, upstream: _address_backward(*ctx.saved_tensors, upstream), setup_context=_save_weights
)
_geometry.register_autograd(_gradient_of_phases, setup_context=_save_geometry)
_read_slots.register_autograd(
    lambda ctx, upstream, _: _read_slots_backward(*ctx.saved_tensors, upstream), setup_context=_save_read
)
