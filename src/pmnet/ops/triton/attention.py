"""Sliding-window attention without scores in memory: forward and backward.

Shapes: B sequences, T queries, H query heads, K key/value heads, E head_dim, W window. The query at t has the place
`W - 1 + t` in the buffer of keys, and sees the last `span` places up to it.

Tiles: the forward and the gradient of queries own BLOCK queries of one head and walk over the `BLOCK + W - 1` keys that
they can see; the gradients of keys and values own BLOCK places of one key head and walk over the queries that can see
them. A walk is in the same order every time and there are no atomics: results are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmnet.ops.window_attention import check_attention

_LOG2E = tl.constexpr(1.4426950408889634)


def attention_forward(
    query: Tensor, keys: Tensor, values: Tensor, span: Tensor, scaling: float
) -> tuple[Tensor, Tensor]:
    """`pmnet.ops.window_attention`, and what its backward needs.

    Args:
        query: `[B, T, H, E]`; float32, bfloat16 or float16.
        keys, values: `[B, W - 1 + T, K, E]`, in the dtype of the query.
        span: int64 in `1..W`, `[B or 1, T]`.
        scaling: factor of the scores.

    Returns:
        `[B, T, H, E]`, and of each query's softmax the greatest score, to base 2, and the inverse of the sum of
        exponentials below it, float32 `[B, H, 2, T]`: their logarithm alone would round the weights once more.

    Raises:
        ValueError: if shapes or dtypes do not agree.
    """
    check_attention(query, keys, values, span)
    query, keys, values, span = (x.contiguous() for x in (query, keys, values, span))
    batch, length, heads, _ = query.shape
    out, softmax = torch.empty_like(query), query.new_empty(batch, heads, 2, length, dtype=torch.float32)
    if query.numel():
        sizes, blocks = _sizes(query, keys, span, most=1 if length == 1 else _block(length))
        with torch.cuda.device_of(query):
            _forward_kernel[_grid(batch * heads, length, blocks)](
                query, keys, values, span, out, softmax, *sizes, scaling * _LOG2E.value, **blocks,
                BLOCK_KEYS=_rows(query, 64 if blocks["BLOCK"] == 64 else 128),
            )  # fmt: skip
    return out, softmax


def attention_backward(
    upstream: Tensor,
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    span: Tensor,
    out: Tensor,
    softmax: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the result with respect to query, keys and values.

    Args:
        upstream: gradient of the result, `[B, T, H, E]`.
        query, keys, values, span, scaling: as in `attention_forward`.
        out, softmax: as it returned them.

    Returns:
        Three gradients, each in the dtype of its input.

    Raises:
        ValueError: if shapes or dtypes do not agree.
    """
    check_attention(query, keys, values, span)
    if upstream.shape != query.shape or upstream.dtype != query.dtype:
        raise ValueError(f"attention: upstream must be {query.dtype} {list(query.shape)}, got {list(upstream.shape)}")
    upstream, query, keys, values, span = (x.contiguous() for x in (upstream, query, keys, values, span))
    batch, length, heads, _ = query.shape
    grads = torch.empty_like(query), torch.empty_like(keys), torch.empty_like(values)
    if not query.numel():
        return grads[0], grads[1].zero_(), grads[2].zero_()
    mean = query.new_empty(batch, heads, length, dtype=torch.float32)  # of the gradients of a query's weights
    (sizes, blocks), places = _sizes(query, keys, span, _block(length)), keys.shape[1]
    with torch.cuda.device_of(query):
        _query_gradient_kernel[_grid(batch * heads, length, blocks)](
            upstream, query, keys, values, span, out, softmax, mean, grads[0], *sizes, scaling, **blocks
        )
        _key_gradient_kernel[_grid(batch * keys.shape[2], places, blocks)](
            upstream, query, keys, values, span, softmax, mean, *grads[1:], *sizes, scaling, **blocks
        )
    return grads


def _block(length: int) -> int:
    return 16 if length < 64 else 64


def _wide(query: Tensor) -> int:
    """Columns of a tile."""
    return max(16, triton.next_power_of_2(query.shape[3]))


def _rows(query: Tensor, most: int) -> int:
    """Rows of a tile: at most so many, and of 16 KiB, so that small GPUs have room for all tiles of a program."""
    return min(most, max(16, 2**14 // (_wide(query) * query.itemsize)))


def _sizes(query: Tensor, keys: Tensor, span: Tensor, most: int) -> tuple[tuple[int, ...], dict[str, int]]:
    """The kernels' sizes in order, and tiles."""
    _, length, heads, width = query.shape
    blocks = {
        "H": heads,
        "K": keys.shape[2],
        "W": keys.shape[1] - length + 1,
        "E": width,
        "BLOCK": _rows(query, most),
        "BLOCK_E": _wide(query),
        "num_warps": 4,
        "num_stages": 2,
    }
    return (length, span.shape[0]), blocks


def _grid(rows: int, length: int, blocks: dict[str, int]) -> tuple[int, int]:
    return rows, triton.cdiv(length, blocks["BLOCK"])  # the second may be 65,535 at most


@triton.jit
def _tile(x, first, places, limit, stride, E: tl.constexpr, BLOCK_E: tl.constexpr):
    """Rows `first + places` of one head, `[BLOCK, BLOCK_E]`; what does not exist is 0."""
    at, e = first + places, tl.arange(0, BLOCK_E)
    exists = (at >= 0) & (at < limit)
    return tl.load(x + at[:, None].to(tl.int64) * stride + e, mask=exists[:, None] & (e < E), other=0.0)


@triton.jit
def _seen(t, place, reach, T, W: tl.constexpr):
    """Bool `[queries, places]`: whether queries t, with spans `reach`, see places of the buffer."""
    last = t + (W - 1)
    seen = (place[None, :] <= last[:, None]) & (place[None, :] > (last - reach)[:, None])
    return seen & (t < T)[:, None] & (place >= 0)[None, :]


@triton.jit
def _forward_kernel(
    query, keys, values, span, out, softmax, T, SPANS, scale,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """`scale` carries the factor that makes `exp2` of `exp`."""
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    first, step, e = tl.program_id(1) * BLOCK, tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    t = first + step
    query += (b * T * H + h) * E
    keys += (b * (T + W - 1) * K + h // (H // K)) * E
    values += (b * (T + W - 1) * K + h // (H // K)) * E
    out += (b * T * H + h) * E
    reach = tl.load(span + (b % SPANS) * T + t, mask=t < T, other=0).to(tl.int32)
    q = _tile(query, first, step, T, H * E, E, BLOCK_E)
    most = tl.full([BLOCK], -1e30, tl.float32)
    weight = tl.zeros([BLOCK], tl.float32)
    mixed = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    place = tl.arange(0, BLOCK_KEYS)
    for start in range(0, BLOCK + W - 1, BLOCK_KEYS):
        k = _tile(keys, first + start, place, T + W - 1, K * E, E, BLOCK_E)
        v = _tile(values, first + start, place, T + W - 1, K * E, E, BLOCK_E)
        if BLOCK == 1:  # a matrix product has at least 16 rows
            score = tl.sum(q[:, None, :].to(tl.float32) * k.to(tl.float32)[None], axis=2) * scale
        else:
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where(_seen(t, first + start + place, reach, T, W), score, float("-inf"))
        higher = tl.maximum(most, tl.max(score, axis=1))
        p, shrink = tl.exp2(score - higher[:, None]), tl.exp2(most - higher)
        weight = weight * shrink + tl.sum(p, axis=1)
        if BLOCK == 1:
            mixed = mixed * shrink[:, None] + tl.sum(p[:, :, None] * v.to(tl.float32)[None], axis=1)
        else:
            mixed = tl.dot(p.to(v.dtype), v, mixed * shrink[:, None], input_precision="ieee")
        most = higher
    weight = tl.where(t < T, weight, 1.0)
    mixed = mixed / weight[:, None]
    exists = (t < T)[:, None] & (e < E)[None, :]
    tl.store(out + t[:, None].to(tl.int64) * (H * E) + e, mixed.to(out.dtype.element_ty), mask=exists)
    softmax += (b * H + h) * 2 * T
    tl.store(softmax + t, most, mask=t < T)
    tl.store(softmax + T + t, 1.0 / weight, mask=t < T)


@triton.jit
def _query_gradient_kernel(
    upstream, query, keys, values, span, out, softmax, mean, grad_query, T, SPANS, scale,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    b, h = (tl.program_id(0) // H).to(tl.int64), tl.program_id(0) % H
    first, step, e = tl.program_id(1) * BLOCK, tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    t = first + step
    head = (b * T * H + h) * E
    keys += (b * (T + W - 1) * K + h // (H // K)) * E
    values += (b * (T + W - 1) * K + h // (H // K)) * E
    reach = tl.load(span + (b % SPANS) * T + t, mask=t < T, other=0).to(tl.int32)
    q = _tile(query + head, first, step, T, H * E, E, BLOCK_E)
    up = _tile(upstream + head, first, step, T, H * E, E, BLOCK_E)
    found = _tile(out + head, first, step, T, H * E, E, BLOCK_E)
    middle = tl.sum(up.to(tl.float32) * found.to(tl.float32), axis=1)
    softmax += (b * H + h) * 2 * T
    most = tl.load(softmax + t, mask=t < T, other=0.0)
    inverse = tl.load(softmax + T + t, mask=t < T, other=0.0)
    tl.store(mean + (b * H + h) * T + t, middle, mask=t < T)
    grad = tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for start in range(0, BLOCK + W - 1, BLOCK):
        k = _tile(keys, first + start, step, T + W - 1, K * E, E, BLOCK_E)
        v = _tile(values, first + start, step, T + W - 1, K * E, E, BLOCK_E)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
        score = tl.where(_seen(t, first + start + step, reach, T, W), score, float("-inf"))
        p = tl.exp2(score - most[:, None]) * inverse[:, None]
        slope = p * (tl.dot(up, tl.trans(v), input_precision="ieee") - middle[:, None]) * scale
        grad = tl.dot(slope.to(k.dtype), k, grad, input_precision="ieee")
    at = grad_query + head + t[:, None].to(tl.int64) * (H * E) + e
    tl.store(at, grad.to(grad_query.dtype.element_ty), mask=(t < T)[:, None] & (e < E)[None, :])


@triton.jit
def _key_gradient_kernel(
    upstream, query, keys, values, span, softmax, mean, grad_keys, grad_values, T, SPANS, scale,
    H: tl.constexpr, K: tl.constexpr, W: tl.constexpr, E: tl.constexpr, BLOCK: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """A place is seen by queries from `place - (W - 1)` to itself; all query heads of its key head add up."""
    b, head_of_keys = (tl.program_id(0) // K).to(tl.int64), tl.program_id(0) % K
    first, step, e = tl.program_id(1) * BLOCK, tl.arange(0, BLOCK), tl.arange(0, BLOCK_E)
    place = first + step
    group = (b * (T + W - 1) * K + head_of_keys) * E
    k = _tile(keys + group, first, step, T + W - 1, K * E, E, BLOCK_E)
    v = _tile(values + group, first, step, T + W - 1, K * E, E, BLOCK_E)
    of_key, of_value = tl.zeros([BLOCK, BLOCK_E], tl.float32), tl.zeros([BLOCK, BLOCK_E], tl.float32)
    for index in range(H // K):
        h = head_of_keys * (H // K) + index
        head = (b * T * H + h) * E
        for start in range(0, BLOCK + W - 1, BLOCK):
            begin = first - (W - 1) + start
            t = begin + step
            real = (t >= 0) & (t < T)
            reach = tl.load(span + (b % SPANS) * T + t, mask=real, other=0).to(tl.int32)
            q = _tile(query + head, begin, step, T, H * E, E, BLOCK_E)
            up = _tile(upstream + head, begin, step, T, H * E, E, BLOCK_E)
            most = tl.load(softmax + (b * H + h) * 2 * T + t, mask=real, other=0.0)
            inverse = tl.load(softmax + ((b * H + h) * 2 + 1) * T + t, mask=real, other=0.0)
            middle = tl.load(mean + (b * H + h) * T + t, mask=real, other=0.0)
            score = tl.dot(q, tl.trans(k), input_precision="ieee") * (scale * _LOG2E)
            score = tl.where(_seen(t, place, reach, T, W), score, float("-inf"))
            p = tl.exp2(score - most[:, None]) * inverse[:, None]
            of_value = tl.dot(tl.trans(p.to(up.dtype)), up, of_value, input_precision="ieee")
            slope = p * (tl.dot(up, tl.trans(v), input_precision="ieee") - middle[:, None]) * scale
            of_key = tl.dot(tl.trans(slope.to(q.dtype)), q, of_key, input_precision="ieee")
    at = group + place[:, None].to(tl.int64) * (K * E) + e
    exists = (place < T + W - 1)[:, None] & (e < E)[None, :]
    tl.store(grad_keys + at, of_key.to(grad_keys.dtype.element_ty), mask=exists)
    tl.store(grad_values + at, of_value.to(grad_values.dtype.element_ty), mask=exists)
