"""The gradient of the write of a level: the scan of `scan.py`, transposed.

Shapes and programs are those of `scan.py`, but places are walked from the last to the first and sums are float64. What
a chunk inherits from those behind it is added up by a first launch, which reads the upstream gradient once more.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmnet.ops.triton.scan import channels, dense, load_row, tiling


def write_gradient(
    upstream: Tensor,
    weights: Tensor,
    rotation: Tensor,
    order: Tensor,
    start: Tensor,
    end: Tensor,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """Gradients of `write_states` with respect to `weights` and `rotation`, rounding passed straight through.

    The gradient of `delta` at a position is the sum of `upstream` over the positions of its segment at or after
    it, divided by the square root of the segment's length if `scale_gradient`. Padding is a segment of its own.

    Args:
        upstream: gradient of the states per radian, float32 `[B, T, C]`.
        weights, rotation, order, start: as in `write_states`.
        end: sorted place -> one past the last place of its segment, int64 `[B, T]`.
        scale_gradient: as in `phase_write`.

    Returns:
        float32 gradients `[B, T, N]` and `[B, T, M]`; deterministic.

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    batch, length, slots = weights.shape
    size = rotation.shape[-1]
    upstream = dense("upstream", upstream, torch.float32, batch, length, slots * size)
    weights = dense("weights", weights, torch.float32, batch, length, slots)
    rotation = dense("rotation", rotation, torch.float32, batch, length, size)
    order = dense("order", order, torch.int64, batch, length)
    start = dense("start", start, torch.int64, batch, length)
    end = dense("end", end, torch.int64, batch, length)
    (rows, chunks), blocks = tiling(batch, length, slots, size)
    of_weights = weights.new_empty(triton.cdiv(size, blocks["BLOCK_M"]), batch, length, slots)
    grad_rotation = torch.empty_like(rotation)
    partial = weights.new_empty(batch, chunks, slots * size, dtype=torch.float64)
    with torch.cuda.device_of(weights):
        if chunks > 1:
            _sum_gradient_kernel[(rows, chunks - 1)](upstream, order, end, partial, length, N=slots, M=size, **blocks)
        if length:
            _write_gradient_kernel[(rows, chunks)](
                upstream, weights, rotation, order, start, end, partial, of_weights, grad_rotation, batch, length,
                N=slots, M=size, SCALE_GRADIENT=scale_gradient, **blocks,
            )  # fmt: skip
    return of_weights.sum(0), grad_rotation


@triton.jit
def _sum_gradient_kernel(
    upstream, order, end, partial, T,
    N: tl.constexpr, M: tl.constexpr, CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What a chunk (but the first) adds to the segment that is open at its beginning, `partial` `[B, chunks, C]`."""
    b, _, _, _, channel, exists = channels(N, M, BLOCK_N, BLOCK_M)
    chunk = tl.program_id(1) + 1
    order, begin = order + b * T, chunk * CHUNK
    place = tl.minimum(tl.load(end + b * T + begin).to(tl.int32), tl.minimum(begin + CHUNK, T)) - 1
    position = b * T + tl.load(order + place)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
    while place >= begin:
        row = tl.load(upstream + position * (N * M) + channel, mask=exists, other=0.0)
        position = b * T + tl.load(order + place - 1)  # there is one: the first chunk is left out
        total += row.to(tl.float64)
        place -= 1
    tl.store(partial + (b * tl.cdiv(T, CHUNK) + chunk) * (N * M) + channel, total, mask=exists)


@triton.jit
def _write_gradient_kernel(
    upstream, weights, rotation, order, start, end, partial, of_weights, grad_rotation, B, T,
    N: tl.constexpr, M: tl.constexpr, SCALE_GRADIENT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The walk from the last place to the first, from zero where a segment ends."""
    b, block, n, m, channel, exists = channels(N, M, BLOCK_N, BLOCK_M)
    chunk = tl.program_id(1)
    order, start, end = order + b * T, start + b * T, end + b * T
    place = tl.minimum((chunk + 1) * CHUNK, T) - 1
    finish = tl.load(end + place).to(tl.int32)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
    later = (finish - 1) // CHUNK
    while later > chunk:
        total += tl.load(partial + (b * tl.cdiv(T, CHUNK) + later) * (N * M) + channel, mask=exists, other=0.0)
        later -= 1
    position = b * T + tl.load(order + place)
    row = tl.load(upstream + position * (N * M) + channel, mask=exists, other=0.0)
    while place >= chunk * CHUNK:
        following = tl.maximum(place - 1, 0)
        next_position = b * T + tl.load(order + following)
        next_finish = tl.load(end + following).to(tl.int32)
        next_row = tl.load(upstream + next_position * (N * M) + channel, mask=exists, other=0.0)
        p, theta = load_row(weights, rotation, position, n, m, N, M)
        if finish == place + 1:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
        total += row.to(tl.float64)
        gradient = total.to(tl.float32)
        if SCALE_GRADIENT:
            count = finish - tl.load(start + place).to(tl.int32)
            gradient = (total * (1.0 / tl.sqrt(count.to(tl.float64)))).to(tl.float32)
        of_p = tl.sum(gradient * theta, axis=1)[:, None]
        of_theta = tl.sum(gradient * p, axis=0)[None, :]
        tl.store(of_weights + (block.to(tl.int64) * B * T + position) * N + n, of_p, mask=n < N)
        tl.store(grad_rotation + position * M + m, of_theta, mask=m < M)
        position, finish, row = next_position, next_finish, next_row
        place -= 1
