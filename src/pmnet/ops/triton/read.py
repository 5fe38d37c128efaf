"""The addressing of a read without its keys in memory: phase attention over the N slots of the visited group.

Its gradient is in `read_gradient.py`.

Shapes: B sequences, T positions, N slots, M phases, R read heads; P = B * T positions in all, K = 2M.

Equations (docs/model.md, read; with values linear in the geometry):
`k[t, n, r] = pi * tanh(W_k[r] geo[t, n] + b_k[r])`, `a[t, n, r] = softmax_n sum_m cos(pi * tanh(q) - k) / sqrt(M)`,
`mixed[t, r] = sum_n a[t, n, r] geo[t, n]`. Angles are counted in half turns here, so that pi appears only inside the
cosine.

Tiles: one program owns all N slots of BLOCK_P positions and one head; neighbouring programs share the geometry in
the cache. Its rows (position, slot) times BLOCK_M columns of keys are a matrix product over K on the tensor cores;
cosine and the sum over phases follow in registers, block after block of the M columns. Keys of half precision are
rounded to 2**-8 or 2**-11; there, tanh, sine and cosine are the processor's own approximations, which are closer. No
atomics: results are the same from run to run.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmnet.ops.backend import interpreted


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
    check(query, geometry, key_weight, key_bias)
    batch, length, heads, size = query.shape
    slots = geometry.shape[2]
    mixed = geometry.new_empty(batch, length, heads, 2 * size)
    attention = geometry.new_empty(batch, length, slots, heads, dtype=torch.float32)
    blocks = tiling(slots, size, geometry.dtype)
    grid = (triton.cdiv(batch * length, blocks["BLOCK_P"]) * heads,)
    with torch.cuda.device_of(query):
        _read_forward_kernel[grid](
            query.contiguous(), geometry.contiguous(), key_weight.contiguous(), key_bias.contiguous(), mixed,
            attention, batch * length, N=slots, M=size, R=heads, **blocks,
        )  # fmt: skip
    return mixed, attention


def check(query: Tensor, geometry: Tensor, key_weight: Tensor, key_bias: Tensor) -> None:
    """ValueError if shapes or dtypes of a read do not agree."""
    batch, length, heads, size = query.shape
    slots, width = geometry.shape[2], heads * size
    shapes = geometry.shape, key_weight.shape, key_bias.shape
    if shapes != ((batch, length, slots, 2 * size), (width, 2 * size), (width,)):
        raise ValueError(
            f"read: query {tuple(query.shape)} [B, T, R, M] needs geometry [B, T, N, 2M], key_weight [R * M, 2M] and "
            f"key_bias [R * M], got {named(shapes)}"
        )
    if geometry.dtype != key_weight.dtype:
        raise ValueError(f"read: geometry is {geometry.dtype}, key_weight is {key_weight.dtype}")


def named(shapes: tuple[torch.Size, ...]) -> str:
    """Shapes for a message."""
    return ", ".join(str(tuple(shape)) for shape in shapes)


def tiling(slots: int, size: int, dtype: torch.dtype, rows: int = 128) -> dict[str, int]:
    """Tile of rows x columns x depth: 128 x 128 x 64 on tensor cores, 64 x 64 x 32 in float32, less if M is small."""
    half = dtype != torch.float32
    rows, columns, depth, warps = (rows, 128, 64, 8) if half else (64, 64, 32, 4)
    block_n = triton.next_power_of_2(slots)
    # two programs share a multiprocessor: one takes cosines while the other multiplies
    registers = {"maxnreg": 128} if torch.version.hip is None else {}  # only compilers for CUDA take a number
    return {
        "BLOCK_P": max(1, rows // block_n),
        "BLOCK_N": block_n,
        "BLOCK_M": min(columns, max(16, triton.next_power_of_2(size))),
        "BLOCK_K": min(depth, max(16, triton.next_power_of_2(2 * size))),
        "APPROXIMATE": half and torch.version.hip is None and not interpreted(),
        "num_warps": warps,
        "num_stages": 3,
        **registers,
    }


@triton.jit
def _instruction(name: tl.constexpr, x):
    """An instruction of one argument and result, float32."""
    return tl.inline_asm_elementwise(name + " $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)


@triton.jit
def tanh(x, APPROXIMATE: tl.constexpr):
    """tanh by an exponential that cannot overflow; below 1/4, where that cancels, by its series to degree 9."""
    if APPROXIMATE:
        return _instruction("tanh.approx.f32", x)
    u = x * x
    series = u * (62.0 / 2835.0) - 17.0 / 315.0
    series = u * series + 2.0 / 15.0
    series = u * series - 1.0 / 3.0
    small = tl.exp(-2.0 * tl.abs(x))
    size = (1.0 - small) / (1.0 + small)
    return tl.where(tl.abs(x) < 0.25, x + x * (u * series), tl.where(x < 0.0, -size, size))


@triton.jit
def tanh_slope(x, y, APPROXIMATE: tl.constexpr):
    """Derivative of y = tanh(x); `1 - y**2`, which cancels where tanh saturates, only where y is rounded anyway."""
    if APPROXIMATE:
        return 1.0 - y * y
    small = tl.exp(-2.0 * tl.abs(x))
    return 4.0 * small / ((1.0 + small) * (1.0 + small))


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
def cos_half_turns(h, APPROXIMATE: tl.constexpr):
    """cos(pi * h) for half turns in [-2, 2]: it is the sine of `| |h| - 1 | - 1/2`, which is within a quarter turn."""
    if APPROXIMATE:
        return _instruction("cos.approx.f32", h * 3.141592653589793)
    return _sin_quarter(tl.abs(tl.abs(h) - 1.0) - 0.5)


@triton.jit
def sin_half_turns(h, APPROXIMATE: tl.constexpr):
    """sin(pi * h) for half turns in [-2, 2], with full relative precision around 0 unless it is approximate."""
    if APPROXIMATE:
        return _instruction("sin.approx.f32", h * 3.141592653589793)
    size = tl.abs(h)
    sine = _sin_quarter(tl.where(size < 0.5, size, tl.where(size < 1.5, 1.0 - size, size - 2.0)))
    return tl.where(h < 0.0, -sine, sine)


@triton.jit
def key_block(
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
    APPROXIMATE: tl.constexpr,
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
        keys = key_block(geometry, key_weight, key_bias, row, row_exists, r * M + m, m < M, K, BLOCK_K)
        q = tl.load(query + p[:, None] * (R * M) + m, mask=p_exists[:, None] & (m < M), other=0.0).to(tl.float32)
        key = tl.reshape(tanh(keys, APPROXIMATE), [BLOCK_P, BLOCK_N, BLOCK_M])
        agreement = cos_half_turns(tanh(q, APPROXIMATE)[:, None, :] - key, APPROXIMATE)
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
