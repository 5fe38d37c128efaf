"""The gradient of `read.py`: keys are computed again, their gradient takes ordinary matrix products from there.

The kernel writes the gradient of the keys before tanh, `[P * N, R * M]`, for a chunk of positions at a time, and its
sums over the rows of every program. Shapes and tiles are those of `read.py`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmnet.ops.triton.read import check, key_block, named, sin_half_turns, tanh, tanh_slope, tiling


def read_backward(
    upstream: Tensor,
    query: Tensor,
    geometry: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    attention: Tensor,
    chunk: int = 16384,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of `mixed` with respect to all four inputs of `read_forward`.

    Args:
        upstream: gradient of `mixed`, `[B, T, R, 2M]` in the dtype of `geometry`.
        query, geometry, key_weight, key_bias: as in `read_forward`.
        attention: as `read_forward` returned it.
        chunk: positions whose gradient of keys, `[chunk * N, R * M]`, is in memory at a time.

    Returns:
        Gradients of query, geometry, key weight and key bias, each in the dtype of its input. Those of weight and
        bias are added up over chunks in float32.

    Raises:
        ValueError: if shapes or dtypes do not agree.
    """
    check(query, geometry, key_weight, key_bias)
    batch, length, heads, size = query.shape
    slots, width = geometry.shape[2], heads * size
    shapes = upstream.shape, attention.shape
    if shapes != ((batch, length, heads, 2 * size), (batch, length, slots, heads)):
        raise ValueError(f"read: upstream must be [B, T, R, 2M] and attention [B, T, N, R], got {named(shapes)}")
    key_weight, key_bias = key_weight.contiguous(), key_bias.contiguous()
    flat = [x.contiguous().flatten(0, 1) for x in (upstream, query, geometry, attention)]
    buffer = geometry.new_empty(min(chunk, batch * length), slots, width)
    grad_query, grad_geometry = torch.empty_like(flat[1]), torch.empty_like(flat[2])
    grad_weight = torch.zeros_like(key_weight, dtype=torch.float32)
    grad_bias = torch.zeros_like(key_bias, dtype=torch.float32)
    for first in range(0, batch * length, chunk):
        here = slice(first, first + chunk)
        up, q, geo, a = (x[here] for x in flat)
        grad_keys, of_geometry = buffer[: len(up)], grad_geometry[here]
        grad_bias += _launch(up, q, geo, key_weight, key_bias, a, grad_query[here], of_geometry, grad_keys)
        of_keys = grad_keys.view(-1, width)
        of_geometry.view(-1, 2 * size).addmm_(of_keys, key_weight)
        grad_weight += of_keys.T @ geo.view(-1, 2 * size)
    return (
        grad_query.view(query.shape),
        grad_geometry.view(geometry.shape),
        grad_weight.to(key_weight.dtype),
        grad_bias.to(key_bias.dtype),
    )


def _launch(
    upstream: Tensor,
    query: Tensor,
    geometry: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    attention: Tensor,
    grad_query: Tensor,
    grad_geometry: Tensor,
    grad_keys: Tensor,
) -> Tensor:
    """Fill the gradients of P positions; returns the sum of that of the keys over positions and slots, `[R * M]`.

    `grad_query` is `[P, R, M]`, `grad_keys` `[P, N, R * M]` (before tanh), and `grad_geometry` `[P, N, 2M]` receives
    what does not come through the keys.
    """
    (positions, heads, size), slots = query.shape, geometry.shape[1]
    blocks = tiling(slots, size, geometry.dtype, rows=64)
    programs = triton.cdiv(positions, blocks["BLOCK_P"])
    sums = query.new_empty(programs, heads * size, dtype=torch.float32)
    width = {"BLOCK_P": 4, "BLOCK_N": blocks["BLOCK_N"], "BLOCK_K": min(256, triton.next_power_of_2(2 * size))}
    with torch.cuda.device_of(query):
        _read_backward_kernel[(programs * heads,)](
            upstream, query, geometry, key_weight, key_bias, attention, grad_query, grad_keys, sums, positions,
            N=slots, M=size, R=heads, **blocks,
        )  # fmt: skip
        _mix_backward_kernel[(triton.cdiv(positions, 4), triton.cdiv(2 * size, width["BLOCK_K"]))](
            upstream, attention, grad_geometry, positions, N=slots, K=2 * size, R=heads, **width
        )
    return sums.sum(0)


@triton.jit
def _read_backward_kernel(
    upstream, query, geometry, key_weight, key_bias, attention, grad_query, grad_keys, sums, P,
    N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    APPROXIMATE: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw query, of the keys before tanh `[P, N, R * M]`, and its sum over the rows of a program."""
    K: tl.constexpr = 2 * M
    first, r = (tl.program_id(0) // R).to(tl.int64) * BLOCK_P, tl.program_id(0) % R
    upstream += (first * R + r) * K
    query += (first * R + r) * M
    grad_query += (first * R + r) * M
    geometry += first * N * K
    attention += first * N * R + r
    grad_keys += (first * N * R + r) * M
    sums += ((tl.program_id(0) // R).to(tl.int64) * R + r) * M
    p, n, index = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P * BLOCK_N)
    p_exists = first + p < P
    slot, slot_exists = p[:, None] * N + n, p_exists[:, None] & (n < N)
    of_a = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        geo = tl.load(geometry + slot[:, :, None] * K + k, mask=slot_exists[:, :, None] & (k < K), other=0.0)
        up = tl.load(upstream + p[:, None] * (R * K) + k, mask=p_exists[:, None] & (k < K), other=0.0)
        of_a += tl.sum(up.to(tl.float32)[:, None, :] * geo.to(tl.float32), axis=2)
    a = tl.load(attention + slot * R, mask=slot_exists, other=0.0)
    of_score = a * (of_a - tl.sum(a * of_a, axis=1)[:, None]) * (3.141592653589793 / M**0.5)

    row = index // BLOCK_N * N + index % BLOCK_N
    row_exists = (first + index // BLOCK_N < P) & (index % BLOCK_N < N)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        keys = key_block(geometry, key_weight, key_bias, row, row_exists, r * M + m, m < M, K, BLOCK_K)
        key = tl.reshape(tanh(keys, APPROXIMATE), [BLOCK_P, BLOCK_N, BLOCK_M])
        q_at, q_exists = p[:, None] * (R * M) + m, p_exists[:, None] & (m < M)
        raw = tl.load(query + q_at, mask=q_exists, other=0.0).to(tl.float32)
        q = tanh(raw, APPROXIMATE)
        of_angle = of_score[:, :, None] * sin_half_turns(q[:, None, :] - key, APPROXIMATE)
        of_query = -tl.sum(of_angle, axis=1) * tanh_slope(raw, q, APPROXIMATE)
        tl.store(grad_query + q_at, of_query.to(grad_query.dtype.element_ty), mask=q_exists)
        slope = tanh_slope(tl.reshape(keys, [BLOCK_P, BLOCK_N, BLOCK_M]), key, APPROXIMATE)
        of_key = of_angle * slope  # 0 where no position is: there, `of_score` is
        at = grad_keys + slot[:, :, None] * (R * M) + m
        tl.store(at, of_key.to(grad_keys.dtype.element_ty), mask=slot_exists[:, :, None] & (m < M))
        tl.store(sums + m, tl.sum(tl.sum(of_key, axis=1), axis=0), mask=m < M)


@triton.jit
def _mix_backward_kernel(
    upstream, attention, grad_geometry, P,
    N: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`sum_r a[p, n, r] upstream[p, r]`, the gradient of the geometry that is mixed."""
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    slot = p[:, None] * N + tl.arange(0, BLOCK_N)
    exists = (p < P)[:, None] & (tl.arange(0, BLOCK_N) < N)
    total = tl.zeros([BLOCK_P, BLOCK_N, BLOCK_K], tl.float32)
    for r in range(R):
        a = tl.load(attention + slot * R + r, mask=exists, other=0.0)
        at = upstream + (p[:, None] * R + r) * K + k
        up = tl.load(at, mask=(p < P)[:, None] & (k < K), other=0.0).to(tl.float32)
        total += a[:, :, None] * up[:, None, :]
    at = grad_geometry + slot[:, :, None] * K + k
    tl.store(at, total.to(grad_geometry.dtype.element_ty), mask=exists[:, :, None] & (k < K))
