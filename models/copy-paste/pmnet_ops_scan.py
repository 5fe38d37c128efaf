"""The segmented phase scan: every state of the memory, for all positions at once, exactly.

Shapes: B sequences, T positions, C phases of a group (N slots times M phases), G groups.

Within a sequence, positions that visit the same group form a *segment*. Sorting positions by group makes each
segment a contiguous run, and a run's partial sums are differences of one prefix sum. Over int32 turns these
differences wrap exactly, so the result is independent of the order of additions, of chunking and of neighbours.
"""

from typing import Any, NamedTuple

import re

import torch
from torch import Tensor

from .pmnet_ops_backend import readable
from .pmnet_ops_gather import take_rows
from .pmnet_ops_native import check_range
from .pmnet_ops_turns import to_radians, to_turns

_NOWHERE = 2**62  # sort key of positions that belong to no segment (padding)


class SegmentPlan(NamedTuple):
    """Where each position's segment lies once positions are sorted by (document, group); all `[B, T]` int64."""

    order: Tensor  # sorted place -> position
    place: Tensor  # position -> sorted place
    start: Tensor  # sorted place -> first place of its segment
    end: Tensor  # sorted place -> one past the last place of its segment
    keys: Tensor  # sorted keys, document * G + group


def plan_segments(segments: Tensor, groups: int, documents: Tensor | None, valid: Tensor | None) -> SegmentPlan:
    """Sort positions into segments. Integers only; runs on the device without synchronising the host."""
    segments = segments.long()
    if segments.shape[1] == 1 and documents is None and valid is None:
        zero = torch.zeros_like(segments)
        return SegmentPlan(zero, zero, zero, zero + 1, segments.contiguous())
    return SegmentPlan(*_plan(segments, groups, documents, valid))


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::plan_segments", mutates_args=())
def _plan(
    segments: Tensor, groups: int, documents: Tensor | None, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One operator: what TorchInductor of torch 2.11 makes of a sort of single positions does not compile for GPUs."""
    keys = segments.clone(memory_format=torch.contiguous_format)
    if documents is not None:
        keys += documents.long() * groups
    if valid is not None:
        keys = torch.where(valid, keys, _NOWHERE).contiguous()
    keys, order = torch.sort(keys, dim=1, stable=True)
    place = torch.empty_like(order).scatter_(1, order, _positions(order))
    return order, place, torch.searchsorted(keys, keys), torch.searchsorted(keys, keys, right=True), keys


_plan.register_fake(lambda segments, *_: tuple(segments.new_empty(segments.shape) for _ in range(5)))


def phase_scan(
    delta: Tensor,
    segments: Tensor,
    initial_state: Tensor,
    documents: Tensor | None = None,
    valid: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Inclusive segmented sum of rotations on the circle (docs/model.md, write), exact to the bit.

    Args:
        delta: int32 turns, `[B, T, C]`.
        segments: group that each position visits, integers in `[0, G)`, `[B, T]`.
        initial_state: int32 turns before the first position, `[B, G, C]`.
        documents: optional non-decreasing document index, `[B, T]`; index 0 continues `initial_state`, every later
            document starts from angle 0.
        valid: optional bool `[B, T]`; a False position writes nothing and its own state is meaningless.

    Returns:
        int32 turns of the visited group right after each position `[B, T, C]`, and of all groups after the last
        position `[B, G, C]` (of the last document).

    Raises:
        ValueError: if a dtype is not int32, shapes do not agree or, on a CPU, a group is out of range.
    """
    _check(delta, segments, initial_state)
    plan = plan_segments(segments, initial_state.shape[1], documents, valid)
    return _scan(delta, segments, initial_state, documents, valid, plan)


def scan_rotations(
    rotation: Tensor,
    segments: Tensor,
    initial_state: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    phase_bits: int,
    cumulative: bool,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor]:
    """`phase_write` in plain PyTorch, from rotations in radians `[B, T, C]`; returns `[B, T, C]` and `[B, G, C]`."""
    delta = to_turns(rotation.detach(), phase_bits)
    _check(delta, segments, initial_state)
    plan = plan_segments(segments, initial_state.shape[1], documents, valid)
    if cumulative:
        states, final_state = _scan(delta, segments, initial_state, documents, valid, plan)
    else:
        states, final_state = delta, initial_state.clone()
    angle = _angle_of_states(rotation, states, *plan[:4], cumulative, scale_gradient)
    return angle, final_state


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::angle_of_states", mutates_args=())
def _angle_of_states(
    rotation: Tensor,
    states: Tensor,
    order: Tensor,
    place: Tensor,
    start: Tensor,
    end: Tensor,
    cumulative: bool,
    scale_gradient: bool,
) -> Tensor:
    """States as radians, in the dtype of the rotations that the gradient goes to."""
    return to_radians(states, rotation.dtype)


@_angle_of_states.register_fake
def _(rotation: Tensor, states: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(states, dtype=rotation.dtype)


def _save_plan(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *_, order, place, start, end, ctx.cumulative, ctx.scale_gradient = inputs
    ctx.save_for_backward(order, place, start, end)


def _gradient_of_rotation(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The transpose of the scan: a reverse segmented sum, in float64."""
    order, place, start, end = ctx.saved_tensors
    gradient = upstream.double()
    if ctx.cumulative:
        prefix = _exclusive_cumsum(take_rows(gradient, order))
        gradient = take_rows(take_rows(prefix, end) - prefix[:, :-1], place)
    if ctx.scale_gradient:
        count = (end - start).gather(1, place)
        gradient = gradient * count.double().rsqrt().unsqueeze(-1)
    return gradient.to(upstream.dtype), None, None, None, None, None, None, None


_angle_of_states.register_autograd(_gradient_of_rotation, setup_context=_save_plan)


def _scan(
    delta: Tensor,
    segments: Tensor,
    initial_state: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    plan: SegmentPlan,
) -> tuple[Tensor, Tensor]:
    groups = initial_state.shape[1]
    prefix = _exclusive_cumsum(take_rows(delta, plan.order))
    states = take_rows(prefix[:, 1:] - take_rows(prefix, plan.start), plan.place)
    before = take_rows(initial_state, segments)
    wanted = torch.arange(groups, device=delta.device).repeat(delta.shape[0], 1)
    if documents is not None:
        before = before.masked_fill((documents != 0).unsqueeze(-1), 0)
        documents = documents if valid is None else documents.masked_fill(~valid, 0)
        last = documents.amax(1, keepdim=True) if documents.shape[1] else documents.new_zeros(delta.shape[0], 1)
        wanted = wanted + last.long() * groups
        initial_state = initial_state.masked_fill((last != 0).unsqueeze(-1), 0)
    written = take_rows(prefix, torch.searchsorted(plan.keys, wanted, right=True))
    written = written - take_rows(prefix, torch.searchsorted(plan.keys, wanted))
    return states + before, initial_state + written


def _exclusive_cumsum(x: Tensor) -> Tensor:
    """Prefix sums `[B, T + 1, C]` of `[B, T, C]`, starting at 0, in the dtype of `x` (int32 wraps)."""
    return torch.nn.functional.pad(x.cumsum(1, dtype=x.dtype), (0, 0, 1, 0))


def _positions(index: Tensor) -> Tensor:
    return torch.arange(index.shape[1], device=index.device).expand_as(index)


def _check(delta: Tensor, segments: Tensor, initial_state: Tensor) -> None:
    if delta.dtype != torch.int32 or initial_state.dtype != torch.int32:
        raise ValueError(f"phase_scan: turns must be int32, got {delta.dtype} and {initial_state.dtype}")
    if delta.dim() != 3 or initial_state.dim() != 3 or segments.shape != delta.shape[:2]:
        raise ValueError(
            f"phase_scan: expected delta [B, T, C], segments [B, T], initial_state [B, G, C], got "
            f"{tuple(delta.shape)}, {tuple(segments.shape)}, {tuple(initial_state.shape)}"
        )
    if initial_state.shape[0] != delta.shape[0] or initial_state.shape[2] != delta.shape[2]:
        raise ValueError(
            f"phase_scan: delta {tuple(delta.shape)} and initial_state {tuple(initial_state.shape)} differ in B or C"
        )
    if readable(segments):
        check_range("groups", segments, initial_state.shape[1])  # beyond, they would be another row's
