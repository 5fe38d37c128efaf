"""The write of a level: quantise, scan and store the angles. Its gradient is in `scan_gradient.py`.

Shapes: B sequences, T positions, N slots, M phases, G groups, C = N * M channels of a group.

Equations (docs/model.md, write): `delta[t, n, m] = p[t, n] * theta[t, m]`, rounded to turns; a state is the
inclusive sum of `delta` over the positions of its segment (same sequence, document and group) up to `t`, plus the
state that the group had before. Neither products nor turns reach memory: angles `[B, T, C]` are written once.

Programs: one warp owns all N slots of a block of phases and walks over a chunk of *sorted places* (see `SegmentPlan`),
where every segment is a contiguous run: one addition per place, from zero where a segment opens. The next place is
loaded while this one is added. What a chunk inherits from those before it is the sum of their deltas since its first
segment opened: a first launch adds these up per chunk, from weights and rotations alone. Sums of states are sums of
integers, so they do not depend on chunks.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROW = 1024  # channels of a program at most, where slots are many: 32 for each thread of a warp
_CHUNK = 128  # places of one program


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
    """Angles of all positions: `phase_scan(to_turns(weights * rotation, phase_bits), ...)`, bit for bit.

    Args:
        weights: `p`, float32 `[B, T, N]`.
        rotation: `theta` in radians, float32 `[B, T, M]`. A product with p of 2**20 or more (the model's are below 4)
            or NaN rotates nothing.
        order: sorted place -> position, int64 `[B, T]`.
        start: sorted place -> first place of its segment, int64 `[B, T]`.
        segments: group that each position visits, int64 in `[0, G)`, `[B, T]`.
        initial_state: int32 turns before the first position, `[B, G, C]`.
        documents: optional non-decreasing document index, int64 `[B, T]`; index 0 continues `initial_state`, every
            later document starts from angle 0.
        valid: optional bool `[B, T]`; a False position writes nothing and its own state is meaningless.
        phase_bits: b in 1..32, rotations are rounded to multiples of `2**-b` turn.

    Returns:
        Radians in `[-pi, pi)` of the visited group right after each position, float32 `[B, T, C]`, and int32 turns of
        all groups after the last position `[B, G, C]` (of the last document).

    Raises:
        ValueError: if a shape or dtype is not as above.
    """
    batch, length, slots = weights.shape
    size, groups = rotation.shape[-1], initial_state.shape[1]
    weights = dense("weights", weights, torch.float32, batch, length, slots)
    rotation = dense("rotation", rotation, torch.float32, batch, length, size)
    order = dense("order", order, torch.int64, batch, length)
    start = dense("start", start, torch.int64, batch, length)
    segments = dense("segments", segments, torch.int64, batch, length)
    initial_state = dense("initial_state", initial_state, torch.int32, batch, groups, slots * size)
    angles, final_state = weights.new_empty(batch, length, slots * size), initial_state.clone()
    if length == 0:
        return angles, final_state
    last = None
    if documents is not None:
        documents = dense("documents", documents, torch.int64, batch, length)
        last = (documents if valid is None else documents.masked_fill(~valid, 0)).amax(1)
        final_state.masked_fill_((last != 0).view(-1, 1, 1), 0)
    if valid is not None:
        valid = dense("valid", valid, torch.bool, batch, length)
    (rows, chunks), blocks = tiling(batch, length, slots, size)
    partial = initial_state.new_empty(batch, chunks, slots * size)
    inputs = weights, rotation, order, start, segments, initial_state, documents, valid
    rounding = {"SCALE": 2**phase_bits / (2 * math.pi), "SHIFT": 32 - phase_bits, "enable_fp_fusion": False}
    with torch.cuda.device_of(weights):
        if chunks > 1:
            _sum_states_kernel[(rows, chunks - 1)](
                *inputs, partial, length, groups, N=slots, M=size, **blocks, **rounding
            )
        _write_states_kernel[(rows, chunks)](
            *inputs, last, partial, angles, final_state, length, groups, N=slots, M=size, **blocks, **rounding
        )
    return angles, final_state


def dense(name: str, x: Tensor, dtype: torch.dtype, *shape: int) -> Tensor:
    """`x` itself, contiguous; the kernels trust shapes and would read past the end of a wrong one."""
    if x.dtype != dtype or x.shape != shape:
        raise ValueError(f"write: {name} must be {dtype} {list(shape)}, got {x.dtype} {list(x.shape)}")
    return x.contiguous()


def tiling(batch: int, length: int, slots: int, size: int) -> tuple[tuple[int, int], dict[str, int]]:
    """Programs and what each of them owns; chunks do not depend on B and T, so neither does the order of sums."""
    block_n = triton.next_power_of_2(slots)
    block_m = min(64, triton.next_power_of_2(size), max(1, _ROW // block_n))
    blocks = {"CHUNK": _CHUNK, "BLOCK_N": block_n, "BLOCK_M": block_m, "num_warps": 1}
    return (batch * triton.cdiv(size, block_m), triton.cdiv(length, _CHUNK)), blocks


@triton.jit
def _to_turns(angle, SCALE: tl.constexpr, SHIFT: tl.constexpr):
    """`pmnet.ops.to_turns` of float32 radians below 2**20: int32 turns; NaN, infinity and larger ones become 0.

    A float64 between 2**52 and 2**53 is an integer, and its last bits count: adding 3 * 2**51 rounds to the nearest
    integer, ties to even, whose last 32 bits are the turns. The product must be rounded *before* that sum, as it is in
    torch: a fused multiply-add would decide ties differently, therefore the launch switches fusion off. For the same
    reason `angle` is a float32 product of its own.
    """
    steps = angle.to(tl.float64) * tl.full([], SCALE, tl.float64)
    turns = (steps + tl.full([], 3.0 * 2.0**51, tl.float64)).to(tl.int64, bitcast=True).to(tl.int32) << SHIFT
    return tl.where(tl.abs(angle) < 2.0**20, turns, 0)


@triton.jit
def _to_radians(turns):
    """`pmnet.ops.to_radians` to float32; the integer becomes a float64 by being the last bits of one."""
    unsigned = turns.to(tl.uint32, bitcast=True) ^ 0x80000000
    whole = (unsigned.to(tl.uint64) | 0x4330000000000000).to(tl.float64, bitcast=True)
    whole -= tl.full([], 2.0**52 + 2.0**31, tl.float64)
    return (whole * tl.full([], 2 * 3.141592653589793 / 2.0**32, tl.float64)).to(tl.float32)


@triton.jit
def channels(N: tl.constexpr, M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr):
    """Sequence and block of a program; its slots, phases, channels `[BLOCK_N, BLOCK_M]`, and which of these exist."""
    blocks = tl.cdiv(M, BLOCK_M)
    block = tl.program_id(0) % blocks
    n = tl.arange(0, BLOCK_N)[:, None]
    m = block * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]
    return (tl.program_id(0) // blocks).to(tl.int64), block, n, m, n * M + m, (n < N) & (m < M)


@triton.jit
def load_row(weights, rotation, position, n, m, N: tl.constexpr, M: tl.constexpr):
    """p `[BLOCK_N, 1]` and theta `[1, BLOCK_M]` of a position."""
    return (
        tl.load(weights + position * N + n, mask=n < N, other=0.0),
        tl.load(rotation + position * M + m, mask=m < M, other=0.0),
    )


@triton.jit
def _opened(sums, initial_state, segments, documents, valid, position, b, G, channel, exists, C: tl.constexpr):
    """`sums`, and what the group had before if `position` opens its segment in the document that continues."""
    enters = True
    if documents is not None:
        enters = tl.load(documents + position) == 0
    if valid is not None:
        enters = enters & (tl.load(valid + position) != 0)
    before = initial_state + (b * G + tl.load(segments + position)) * C + channel
    return sums + tl.load(before, mask=exists & enters, other=0)


@triton.jit
def _sum_states_kernel(
    weights, rotation, order, start, segments, initial_state, documents, valid, partial, T, G,
    N: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """What a chunk (but the last) adds to the segment that is open at its end, `partial` `[B, chunks, C]`."""
    b, _, n, m, channel, exists = channels(N, M, BLOCK_N, BLOCK_M)
    chunk = tl.program_id(1)
    order, start = order + b * T, start + b * T
    stop = (chunk + 1) * CHUNK
    begin = tl.load(start + stop - 1).to(tl.int32)
    place = tl.maximum(chunk * CHUNK, begin)
    position = b * T + tl.load(order + place)
    total = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    if place == begin:
        total = _opened(total, initial_state, segments, documents, valid, position, b, G, channel, exists, N * M)
    p, theta = load_row(weights, rotation, position, n, m, N, M)
    position = b * T + tl.load(order + place + 1)  # there is one: the last chunk is left out
    while place < stop:  # not range: the interpreter takes no run-time bound there
        next_p, next_theta = load_row(weights, rotation, position, n, m, N, M)
        position = b * T + tl.load(order + tl.minimum(place + 2, T - 1))
        total += _to_turns(p * theta, SCALE, SHIFT)
        p, theta = next_p, next_theta
        place += 1
    tl.store(partial + (b * tl.cdiv(T, CHUNK) + chunk) * (N * M) + channel, total, mask=exists)


@triton.jit
def _write_states_kernel(
    weights, rotation, order, start, segments, initial_state, documents, valid, last, partial, angles, final_state,
    T, G,
    N: tl.constexpr, M: tl.constexpr, SCALE: tl.constexpr, SHIFT: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    b, _, n, m, channel, exists = channels(N, M, BLOCK_N, BLOCK_M)
    chunk = tl.program_id(1)
    order, start = order + b * T, start + b * T
    place, stop = chunk * CHUNK, tl.minimum((chunk + 1) * CHUNK, T)
    begin = tl.load(start + place).to(tl.int32)
    turns = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    earlier = begin // CHUNK
    while earlier < chunk:
        turns += tl.load(partial + (b * tl.cdiv(T, CHUNK) + earlier) * (N * M) + channel, mask=exists, other=0)
        earlier += 1
    position = b * T + tl.load(order + place)
    p, theta = load_row(weights, rotation, position, n, m, N, M)
    while place < stop:
        following = tl.minimum(place + 1, T - 1)
        next_position = b * T + tl.load(order + following)
        next_begin = tl.load(start + following).to(tl.int32)
        next_p, next_theta = load_row(weights, rotation, next_position, n, m, N, M)
        if begin == place:
            turns = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            turns = _opened(turns, initial_state, segments, documents, valid, position, b, G, channel, exists, N * M)
        turns += _to_turns(p * theta, SCALE, SHIFT)
        tl.store(angles + position * (N * M) + channel, _to_radians(turns), mask=exists)
        if (next_begin == place + 1) | (place + 1 == T):  # the segment closes, and its state leaves
            leaves = True
            if documents is not None:
                leaves = tl.load(documents + position) == tl.load(last + b)
            if valid is not None:
                leaves = leaves & (tl.load(valid + position) != 0)
            after = final_state + (b * G + tl.load(segments + position)) * (N * M) + channel
            tl.store(after, turns, mask=exists & leaves)
        position, begin, p, theta = next_position, next_begin, next_p, next_theta
        place += 1
