"""The addressing of a read without its keys in memory: phase attention over the N slots of the visited group.

Shapes: B sequences, T positions, N slots, M phases, R read heads; P = B * T positions in all, K = 2M.

Equations (docs/model.md, read; with values linear in the geometry):
`k[t, n, r] = pi * tanh(W_k[r] geo[t, n] + b_k[r])`, `a[t, n, r] = softmax_n sum_m cos(pi * tanh(q) - k) / sqrt(M)`,
`mixed[t, r] = sum_n a[t, n, r] geo[t, n]`. Angles are counted in half turns here, so that pi appears only inside the
cosine.

Tiles: one program owns all N slots of BLOCK_P positions and one head; neighbouring programs share the geometry in
the cache. Its rows (position, slot) times BLOCK_M columns of keys are a matrix product over K on the tensor cores;
cosine and the sum over phases follow in registers, block after block of the M columns. The backward does the same
again and writes the gradient of the keys before tanh, `[P * N, R * M]`, for a chunk of positions at a time; ordinary
matrix products take it from there. No atomics: results are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


def read_forward(query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Phase attention over slots, and the geometry it mixes.

    Args:
        query: before tanh, `[B, T, R, M]`.
        geometry: sines and cosines of the slots, `[B, T, N, 2M]`; float32, bfloat16 or float16.
        key_weight: `[R * M, 2M]`, in the dtype of `geometry`.
        key_bias: `[R * M]`.

    Returns:
        mixed: `[B, T, R, 2M]` in the dtype of `geometry`.
        attention: weights that sum to 1 over the slots, float32 `[B, T, N, R]`.

    Raises:
        ValueError: if shapes or dtypes do not agree.
    """
    _check(query, geometry, key_weight, key_bias)
    batch, length, heads, size = query.shape
    slots = geometry.shape[2]
    mixed = geometry.new_empty(batch, length, heads, 2 * size)
    attention = geometry.new_empty(batch, length, slots, heads, dtype=torch.float32)
    blocks = _blocks(slots, size, geometry.dtype)
    grid = (triton.cdiv(batch * length, blocks["BLOCK_P"]) * heads,)
    with torch.cuda.device_of(query):
        _read_forward_kernel[grid](
            query.contiguous(), geometry.contiguous(), key_weight.contiguous(), key_bias.contiguous(), mixed,
            attention, batch * length, N=slots, M=size, R=heads, **blocks,
            maxnreg=128,  # two programs share a multiprocessor: one takes cosines while the other multiplies
        )  # fmt: skip
    return mixed, attention


def read_backward(
    upstream: Tensor,
    query: Tensor,
    geometry: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    attention: Tensor,
    chunk: int = 4096,
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
    _check(query, geometry, key_weight, key_bias)
    batch, length, heads, size = query.shape
    slots, width = geometry.shape[2], heads * size
    shapes = upstream.shape, attention.shape
    if shapes != ((batch, length, heads, 2 * size), (batch, length, slots, heads)):
        raise ValueError(f"read: upstream must be [B, T, R, 2M] and attention [B, T, N, R], got {_named(shapes)}")
    key_weight, key_bias = key_weight.contiguous(), key_bias.contiguous()
    flat = [x.contiguous().flatten(0, 1) for x in (upstream, query, geometry, attention)]
    buffer = geometry.new_empty(min(chunk, batch * length), slots, width)
    grad_query, grad_geometry = torch.empty_like(flat[1]), torch.empty_like(flat[2])
    grad_weight = torch.zeros_like(key_weight, dtype=torch.float32)
    grad_bias = torch.zeros_like(key_bias, dtype=torch.float32)
    for first in range(0, batch * length, chunk):
        here = slice(first, first + chunk)
        up, q, geo, a = (x[here] for x in flat)
        grad_keys = buffer[: len(up)]
        _launch_backward(up, q, geo, key_weight, key_bias, a, grad_query[here], grad_keys)
        of_keys = grad_keys.view(-1, width)
        grad_geometry[here] = torch.baddbmm((of_keys @ key_weight).view(geo.shape), a.to(geo.dtype), up)
        grad_weight += of_keys.T @ geo.view(-1, 2 * size)
        grad_bias += of_keys.sum(0, dtype=torch.float32)
    return (
        grad_query.view(query.shape),
        grad_geometry.view(geometry.shape),
        grad_weight.to(key_weight.dtype),
        grad_bias.to(key_bias.dtype),
    )


def _launch_backward(
    upstream: Tensor,
    query: Tensor,
    geometry: Tensor,
    key_weight: Tensor,
    key_bias: Tensor,
    attention: Tensor,
    grad_query: Tensor,
    grad_keys: Tensor,
) -> None:
    """Fill `grad_query` `[P, R, M]` and `grad_keys` `[P, N, R * M]` (before tanh), for P positions."""
    (positions, heads, size), slots = query.shape, geometry.shape[1]
    blocks = _blocks(slots, size, geometry.dtype)
    with torch.cuda.device_of(query):
        _read_backward_kernel[(triton.cdiv(positions, blocks["BLOCK_P"]) * heads,)](
            upstream, query, geometry, key_weight, key_bias, attention, grad_query, grad_keys, positions,
            N=slots, M=size, R=heads, **blocks,
        )  # fmt: skip


def _check(query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor) -> None:
    batch, length, heads, size = query.shape
    slots, width = geometry.shape[2], heads * size
    shapes = geometry.shape, key_weight.shape, key_bias.shape
    if shapes != ((batch, length, slots, 2 * size), (width, 2 * size), (width,)):
        raise ValueError(
            f"read: query {tuple(query.shape)} [B, T, R, M] needs geometry [B, T, N, 2M], key_weight [R * M, 2M] and "
            f"key_bias [R * M], got {_named(shapes)}"
        )
    if geometry.dtype != key_weight.dtype:
        raise ValueError(f"read: geometry is {geometry.dtype}, key_weight is {key_weight.dtype}")


def _named(shapes: tuple[torch.Size, ...]) -> str:
    return ", ".join(str(tuple(shape)) for shape in shapes)


def _blocks(slots: int, size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile of rows x columns x depth: 128 x 128 x 64 on tensor cores, 64 x 64 x 32 in float32, less if M is small."""
    rows, columns, depth, warps = (64, 64, 32, 4) if dtype == torch.float32 else (128, 128, 64, 8)
    block_n = triton.next_power_of_2(slots)
    return {
        "BLOCK_P": max(1, rows // block_n),
        "BLOCK_N": block_n,
        "BLOCK_M": min(columns, max(16, triton.next_power_of_2(size))),
        "BLOCK_K": min(depth, max(16, triton.next_power_of_2(2 * size))),
        "num_warps": warps,
        "num_stages": 3,
    }


@triton.jit
def _tanh(x):
    """tanh by an exponential that cannot overflow; below 1/4, where that cancels, by its series to degree 9."""
    u = x * x
    series = u * (62.0 / 2835.0) - 17.0 / 315.0
    series = u * series + 2.0 / 15.0
    series = u * series - 1.0 / 3.0
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.25, x + x * (u * series), tl.where(x < 0.0, -size, size))


@triton.jit
def _sin_quarter(h):
    """sin(pi * h) for half turns in [-1/2, 1/2]: the Taylor series to degree 13, whose rest is below 1e-9.

    Cheaper than a cosine for any argument, and no slow path for large ones that would take registers.
    """
    x = h * 3.141592653589793
    u = x * x
    series = u * (1.0 / 6227020800.0) - 1.0 / 39916800.0
    series = u * series + 1.0 / 362880.0
    series = u * series - 1.0 / 5040.0
    series = u * series + 1.0 / 120.0
    series = u * series - 1.0 / 6.0
    return x + x * (u * series)


@triton.jit
def _cos_half_turns(h):
    """cos(pi * h) for half turns in [-2, 2]: it is the sine of `| |h| - 1 | - 1/2`, which is within a quarter turn."""
    return _sin_quarter(tl.abs(tl.abs(h) - 1.0) - 0.5)


@triton.jit
def _sin_half_turns(h):
    """sin(pi * h) for half turns in [-2, 2], with full relative precision around 0."""
    size = tl.abs(h)
    sine = _sin_quarter(tl.where(size < 0.5, size, tl.where(size < 1.5, 1.0 - size, size - 2.0)))
    return tl.where(h < 0.0, -sine, sine)


@triton.jit
def _key_block(
    geometry, key_weight, key_bias, row, row_exists, column, column_exists,
    K: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Keys before tanh for given rows of geometry and rows ("columns" of keys) of the weight, float32."""
    acc = tl.zeros([row.shape[0], column.shape[0]], tl.float32)
    for first in range(0, K, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        of_row = row_exists[:, None] & (k < K)[None, :]
        of_column = (k < K)[:, None] & column_exists[None, :]
        geo = tl.load(geometry + row[:, None] * K + k[None, :], mask=of_row, other=0.0)
        weight = tl.load(key_weight + column[None, :] * K + k[:, None], mask=of_column, other=0.0)
        acc = tl.dot(geo, weight, acc, input_precision="ieee")
    return acc + tl.load(key_bias + column, mask=column_exists, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _read_forward_kernel(
    query, geometry, key_weight, key_bias, mixed, attention, P,
    N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    K: tl.constexpr = 2 * M
    first, r = (tl.program_id(0) // R).to(tl.int64) * BLOCK_P, tl.program_id(0) % R
    query += (first * R + r) * M
    geometry += first * N * K
    mixed += (first * R + r) * K
    attention += first * N * R + r
    p, n, index = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_P * BLOCK_N)
    p_exists = first + p < P
    row = index // BLOCK_N * N + index % BLOCK_N
    row_exists = (first + index // BLOCK_N < P) & (index % BLOCK_N < N)
    score = tl.zeros([BLOCK_P, BLOCK_N], tl.float32)
    for start in range(0, M, BLOCK_M):
        m = start + tl.arange(0, BLOCK_M)
        keys = _key_block(geometry, key_weight, key_bias, row, row_exists, r * M + m, m < M, K, BLOCK_K)
        q = tl.load(query + p[:, None] * (R * M) + m, mask=p_exists[:, None] & (m < M), other=0.0).to(tl.float32)
        agreement = _cos_half_turns(_tanh(q)[:, None, :] - tl.reshape(_tanh(keys), [BLOCK_P, BLOCK_N, BLOCK_M]))
        score += tl.sum(agreement, axis=2)  # from M on, 1 for every slot: no matter to the softmax

    score = tl.where((n < N)[None, :], score * (1.0 / M**0.5), float("-inf"))
    a = tl.exp(score - tl.max(score, axis=1)[:, None])
    a = a / tl.sum(a, axis=1)[:, None]
    slot, slot_exists = p[:, None] * N + n, p_exists[:, None] & (n < N)
    tl.store(attention + slot * R, a, mask=slot_exists)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        geo = tl.load(geometry + slot[:, :, None] * K + k, mask=slot_exists[:, :, None] & (k < K), other=0.0)
        mix = tl.sum(a[:, :, None] * geo.to(tl.float32), axis=1).to(mixed.dtype.element_ty)
        tl.store(mixed + p[:, None] * (R * K) + k, mix, mask=p_exists[:, None] & (k < K))


@triton.jit
def _read_backward_kernel(
    upstream, query, geometry, key_weight, key_bias, attention, grad_query, grad_keys, P,
    N: tl.constexpr, M: tl.constexpr, R: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Gradient of the raw query, and of the keys before tanh `[P, N, R * M]`."""
    K: tl.constexpr = 2 * M
    first, r = (tl.program_id(0) // R).to(tl.int64) * BLOCK_P, tl.program_id(0) % R
    upstream += (first * R + r) * K
    query += (first * R + r) * M
    grad_query += (first * R + r) * M
    geometry += first * N * K
    attention += first * N * R + r
    grad_keys += (first * N * R + r) * M
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
        keys = _key_block(geometry, key_weight, key_bias, row, row_exists, r * M + m, m < M, K, BLOCK_K)
        key = tl.reshape(_tanh(keys), [BLOCK_P, BLOCK_N, BLOCK_M])
        q_at, q_exists = p[:, None] * (R * M) + m, p_exists[:, None] & (m < M)
        q = _tanh(tl.load(query + q_at, mask=q_exists, other=0.0).to(tl.float32))
        of_angle = of_score[:, :, None] * _sin_half_turns(q[:, None, :] - key)
        of_query = -tl.sum(of_angle, axis=1) * (1.0 - q * q)
        tl.store(grad_query + q_at, of_query.to(grad_query.dtype.element_ty), mask=q_exists)
        of_key = (of_angle * (1.0 - key * key)).to(grad_keys.dtype.element_ty)
        tl.store(grad_keys + slot[:, :, None] * (R * M) + m, of_key, mask=slot_exists[:, :, None] & (m < M))
