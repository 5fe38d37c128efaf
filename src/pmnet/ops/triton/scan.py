"""The write of a level in two launches: quantise, scan and store the states; transpose that for the gradient.

Shapes: B sequences, T positions, N slots, M phases, G groups, C = N * M channels of a group.

Equations (docs/model.md, write): `delta[t, n, m] = p[t, n] * theta[t, m]`, rounded to turns; a state is the
inclusive sum of `delta` over the positions of its segment (same sequence, document and group) up to `t`, plus the
state that the group had before. The product never reaches memory: `[B, T, C]` is written once and read never.

Tiles: one program owns all N slots of a block of phases of one sequence and walks over *sorted places* (see
`SegmentPlan`), where every segment is a contiguous run. A tile of `[BLOCK_T, BLOCK_N, BLOCK_M]` is summed by an
associative scan that restarts where a segment opens; the sum of the segment that is open at the tile's edge is
carried to the next tile. Each step gathers and scatters rows of BLOCK_M neighbouring phases (128 bytes). Sums of
states are sums of integers, so they do not depend on tiles; those of gradients are float64.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_TILE = 4096  # elements of a tile at most: 16 for each thread of 8 warps


def write_states(
    weights: Tensor,
    rotation: Tensor,
    order: Tensor,
    start: Tensor,
    segments: Tensor,
    initial_state: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    phase_bits: int,
) -> tuple[Tensor, Tensor]:
    """States of all positions: `phase_scan(to_turns(weights * rotation, phase_bits), ...)`, bit for bit.

    Args:
        weights: `p`, float32 `[B, T, N]`.
        rotation: `theta` in radians, float32 `[B, T, M]`.
        order: sorted place -> position, int64 `[B, T]`.
        start: sorted place -> first place of its segment, int64 `[B, T]`.
        segments: group that each position visits, int64 in `[0, G)`, `[B, T]`.
        initial_state: int32 turns before the first position, `[B, G, C]`.
        documents: optional non-decreasing document index, int64 `[B, T]`; index 0 continues `initial_state`, every
            later document starts from angle 0.
        valid: optional bool `[B, T]`; a False position writes nothing and its own state is meaningless.
        phase_bits: b in 1..32, rotations are rounded to multiples of `2**-b` turn.

    Returns:
        int32 turns of the visited group right after each position `[B, T, C]`, and of all groups after the last
        position `[B, G, C]` (of the last document).

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    batch, length, slots = weights.shape
    size, groups = rotation.shape[-1], initial_state.shape[1]
    weights = _dense("weights", weights, torch.float32, batch, length, slots)
    rotation = _dense("rotation", rotation, torch.float32, batch, length, size)
    order = _dense("order", order, torch.int64, batch, length)
    start = _dense("start", start, torch.int64, batch, length)
    segments = _dense("segments", segments, torch.int64, batch, length)
    initial_state = _dense("initial_state", initial_state, torch.int32, batch, groups, slots * size)
    states, final_state = initial_state.new_empty(batch, length, slots * size), initial_state.clone()
    if length == 0:
        return states, final_state
    last = None
    if documents is not None:
        documents = _dense("documents", documents, torch.int64, batch, length)
        last = (documents if valid is None else documents.masked_fill(~valid, 0)).amax(1)
        final_state.masked_fill_((last != 0).view(-1, 1, 1), 0)
    if valid is not None:
        valid = _dense("valid", valid, torch.bool, batch, length)
    grid, blocks = _tiling(batch, slots, size)
    with torch.cuda.device_of(weights):
        _write_states_kernel[grid](
            weights, rotation, order, start, segments, initial_state, documents, valid, last, states, final_state,
            length, groups, N=slots, M=size, SCALE=2**phase_bits / (2 * math.pi), SHIFT=32 - phase_bits,
            **blocks, enable_fp_fusion=False,  # see _to_turns
        )  # fmt: skip
    return states, final_state


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
    upstream = _dense("upstream", upstream, torch.float32, batch, length, slots * size)
    weights = _dense("weights", weights, torch.float32, batch, length, slots)
    rotation = _dense("rotation", rotation, torch.float32, batch, length, size)
    order = _dense("order", order, torch.int64, batch, length)
    start = _dense("start", start, torch.int64, batch, length)
    end = _dense("end", end, torch.int64, batch, length)
    grid, blocks = _tiling(batch, slots, size)
    partial = weights.new_empty(triton.cdiv(size, blocks["BLOCK_M"]), batch, length, slots)
    grad_rotation = torch.empty_like(rotation)
    with torch.cuda.device_of(weights):
        _write_gradient_kernel[grid](
            upstream, weights, rotation, order, start, end, partial, grad_rotation, batch, length,
            N=slots, M=size, SCALE_GRADIENT=scale_gradient, **blocks,
        )  # fmt: skip
    return partial.sum(0), grad_rotation


def _dense(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """`x` itself, contiguous; the kernels trust shapes and would read past the end of a wrong one."""
    if x.dtype != dtype or x.shape != shape:
        raise ValueError(f"write: {name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    return x.contiguous()


def _tiling(batch: int, slots: int, size: int) -> tuple[tuple[int], dict[str, int]]:
    """Grid, tile and warps. They do not depend on B and T, so neither does the order of a position's sums."""
    block_n, block_m = triton.next_power_of_2(slots), min(32, triton.next_power_of_2(size))
    tile = {"BLOCK_T": max(1, _TILE // (32 * block_n)), "BLOCK_N": block_n, "BLOCK_M": block_m, "num_warps": 8}
    return (batch * triton.cdiv(size, block_m),), tile


@triton.jit
def _to_turns(angle, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """`pmnet.ops.to_turns` of float32 radians: int32 turns, NaN and infinity become 0.

    Adding and subtracting 2**52 rounds a float64 below it to the nearest integer, ties to even. The product must
    be rounded *before* that sum, as it is in torch: a fused multiply-add would decide ties differently, therefore
    the launch switches fusion off. For the same reason `angle` is a float32 product of its own. From 2**63 steps on,
    where a conversion to int64 means nothing, the result is 0 as well.
    """
    integers = tl.full([], 2.0**52, tl.float64)
    steps = angle.to(tl.float64) * tl.full([], SCALE, tl.float64)
    size = tl.abs(steps)
    size = tl.where(size < integers, (size + integers) - integers, size)
    size = tl.where(size < tl.full([], 2.0**63, tl.float64), size, 0.0)
    turns = size.to(tl.int64) << SHIFT
    return tl.where(steps < 0, -turns, turns).to(tl.int32)  # int64 to int32 wraps


@triton.jit
def _restarting_sum(restarts_a, sum_a, restarts_b, sum_b):
    """Associative: the sum of two neighbouring runs, from the last restart on."""
    return restarts_a | restarts_b, tl.where(restarts_b, sum_b, sum_a + sum_b)


@triton.jit
def _scan_tile(values, restarts, carried):
    """Inclusive sums of `[BLOCK_T, BLOCK_N, BLOCK_M]` down the rows since the last restart `[BLOCK_T]`.

    `carried` is the sum that is still running when the tile begins; returned with the one that runs on behind it.
    """
    row = tl.arange(0, values.shape[0])
    values += tl.where(((row == 0) & ~restarts)[:, None, None], carried[None], 0)
    _, sums = tl.associative_scan((tl.broadcast_to(restarts[:, None, None], values.shape), values), 0, _restarting_sum)
    last = (row == values.shape[0] - 1)[:, None, None]
    return sums, tl.sum(tl.where(last, sums, 0), axis=0)


@triton.jit
def _write_states_kernel(
    weights, rotation, order, start, segments, initial_state, documents, valid, last, states, final_state, T, G,
    N: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(M, BLOCK_M)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    n = tl.arange(0, BLOCK_N)[None, :]
    m = (tl.program_id(0) % blocks) * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    channel = n[:, :, None] * M + m[:, None, :]
    carried = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    first = 0
    while first < T:  # not range: the interpreter takes no run-time bound there
        place = first + tl.arange(0, BLOCK_T)
        here = place < T
        position = b * T + tl.load(order + b * T + place, mask=here, other=0)
        begin = tl.load(start + b * T + place, mask=here, other=-1)
        next_begin = tl.load(start + b * T + place + 1, mask=place + 1 < T, other=-1)
        opens, closes = begin == place, here & (begin != next_begin)
        enters, leaves = opens, closes  # where the group's state enters and leaves the segment
        if documents is not None:
            document = tl.load(documents + position, mask=here, other=0)
            enters, leaves = enters & (document == 0), leaves & (document == tl.load(last + b))
        if valid is not None:
            real = tl.load(valid + position, mask=here, other=0) != 0
            enters, leaves = enters & real, leaves & real
        group = b * G + tl.load(segments + position, mask=enters | leaves, other=0)

        here_n, here_m = here[:, None] & (n < N), here[:, None] & (m < M)
        exists = here_n[:, :, None] & here_m[:, None, :]
        p = tl.load(weights + position[:, None] * N + n, mask=here_n, other=0.0)
        theta = tl.load(rotation + position[:, None] * M + m, mask=here_m, other=0.0)
        turns = _to_turns(p[:, :, None] * theta[:, None, :], SCALE, SHIFT)
        at_group = group[:, None, None] * (N * M) + channel
        turns += tl.load(initial_state + at_group, mask=exists & enters[:, None, None], other=0)
        turns, carried = _scan_tile(turns, opens, carried)
        tl.store(states + position[:, None, None] * (N * M) + channel, turns, mask=exists)
        tl.store(final_state + at_group, turns, mask=exists & leaves[:, None, None])
        first += BLOCK_T


@triton.jit
def _write_gradient_kernel(
    upstream, weights, rotation, order, start, end, partial, grad_rotation, B, T,
    N: tl.constexpr, M: tl.constexpr, SCALE_GRADIENT: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The same walk from the last place to the first, restarting where a segment ends."""
    blocks = tl.cdiv(M, BLOCK_M)
    b, block = (tl.program_id(0) // blocks).to(tl.int64), tl.program_id(0) % blocks
    n = tl.arange(0, BLOCK_N)[None, :]
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    channel = n[:, :, None] * M + m[:, None, :]
    carried = tl.zeros([BLOCK_N, BLOCK_M], tl.float64)
    first = 0
    while first < T:
        place = T - 1 - first - tl.arange(0, BLOCK_T)
        here = place >= 0
        position = b * T + tl.load(order + b * T + place, mask=here, other=0)
        begin = tl.load(start + b * T + place, mask=here, other=0)
        finish = tl.load(end + b * T + place, mask=here, other=1)
        here_n, here_m = here[:, None] & (n < N), here[:, None] & (m < M)
        exists = here_n[:, :, None] & here_m[:, None, :]
        gradient = tl.load(upstream + position[:, None, None] * (N * M) + channel, mask=exists, other=0.0)
        gradient = gradient.to(tl.float64)
        gradient, carried = _scan_tile(gradient, finish == place + 1, carried)
        if SCALE_GRADIENT:
            gradient *= (1.0 / tl.sqrt((finish - begin).to(tl.float64)))[:, None, None]
        gradient = gradient.to(tl.float32)

        p = tl.load(weights + position[:, None] * N + n, mask=here_n, other=0.0)
        theta = tl.load(rotation + position[:, None] * M + m, mask=here_m, other=0.0)
        of_p = tl.sum(gradient * theta[:, None, :], axis=2)
        of_theta = tl.sum(gradient * p[:, :, None], axis=1)
        tl.store(partial + (block.to(tl.int64) * B * T + position)[:, None] * N + n, of_p, mask=here_n)
        tl.store(grad_rotation + position[:, None] * M + m, of_theta, mask=here_m)
        first += BLOCK_T
