"""The unitary phasor update of a level, for all positions at once (docs/model.md, write).

Shapes: B sequences, T positions, G groups of the level, N slots, M phases.
"""

from typing import Any

import re

import torch
from torch import Tensor

from . import pmnet_ops_backend as backend
from .pmnet_ops_native import check_range, kernels, pointers
from .pmnet_ops_phase import to_angle
from .pmnet_ops_scan import scan_rotations

_PART = 32  # phases of one native walk: PART of native/scan.cpp


def phase_write(
    weights: Tensor,
    raw: Tensor,
    groups: Tensor,
    memory: Tensor,
    documents: Tensor | None = None,
    valid: Tensor | None = None,
    phase_bits: int = 32,
    cumulative: bool = True,
    scale_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Turn the slots of the visited groups, `S_n <- (S_n + p_n * theta) mod 2 pi`, exactly.

    Rotations are rounded to `2**-phase_bits` turn, straight-through in backward, and summed as int32 turns.

    Args:
        weights: p, `[B, T, N]`.
        raw: `theta = pi * tanh(raw)`, `[B, T, M]`.
        groups: group that each position visits, int64 in `[0, G)`, `[B, T]`.
        memory: int32 turns before the first position, `[B, G, N, M]`.
        documents: optional non-decreasing document index, `[B, T]`; 0 continues `memory`, every later document
            starts from angle 0.
        valid: optional bool `[B, T]`; a False position writes nothing and its own state is meaningless.
        phase_bits: b in 1..32.
        cumulative: False gives the no-recurrence ablation: the angle is the rounded rotation itself and the
            memory stays as it was.
        scale_gradient: divide the gradient of a rotation by the square root of its segment's length.

    Returns:
        The angles of the visited slots right after each write, radians in `[-pi, pi)`, `[B, T, N, M]`, and the memory
        after the last position, int32 turns `[B, G, N, M]`. The Jacobian of an angle with respect to the rotations of
        its segment is the identity, so the backward is a reverse segmented sum.

    Raises:
        ValueError: if shapes or dtypes do not agree, `phase_bits` is out of range, or, on a CPU, a group is.
    """
    if not 1 <= phase_bits <= 32:
        raise ValueError(f"phase_write: phase_bits must be from 1 to 32, got {phase_bits}")
    expected = (weights.shape[0], memory.shape[1], weights.shape[2], raw.shape[-1])
    if raw.shape[:2] != weights.shape[:2] or groups.shape != weights.shape[:2] or memory.shape != expected:
        raise ValueError(
            "phase_write: expected weights [B, T, N], raw [B, T, M], groups [B, T], memory [B, G, N, M], got "
            f"{tuple(weights.shape)}, {tuple(raw.shape)}, {tuple(groups.shape)}, {tuple(memory.shape)}"
        )
    for name, ids in (("documents", documents), ("valid", valid)):
        if ids is not None and (ids.shape != groups.shape or (name == "valid" and ids.dtype != torch.bool)):
            raise ValueError(f"phase_write: {name} must be [B, T], valid of bools, got {tuple(ids.shape)} {ids.dtype}")
    if memory.dtype != torch.int32:
        raise ValueError(f"phase_write: memory must be int32 turns, got {memory.dtype}")
    groups, documents = groups.long(), None if documents is None else documents.long()
    if backend.runs_native(weights, raw):
        return _phase_write(weights, raw, groups, memory, documents, valid, phase_bits, cumulative, scale_gradient)
    theta = to_angle(raw)
    if backend.runs_triton(weights) and cumulative and weights.dtype == theta.dtype == torch.float32:
        from .pmnet_ops_triton import operators

        return operators.phase_write(weights, theta, groups, memory, documents, valid, phase_bits, scale_gradient)
    rotation = weights.unsqueeze(-1) * theta.unsqueeze(2)
    angle, after = scan_rotations(
        rotation.flatten(2), groups, memory.flatten(2), documents, valid, phase_bits, cumulative, scale_gradient
    )
    return angle.view_as(rotation), after.view_as(memory)


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::phase_write", mutates_args=())
def _phase_write(
    weights: Tensor,
    raw: Tensor,
    groups: Tensor,
    memory: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    phase_bits: int,
    cumulative: bool,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor]:
    check_range("groups", groups, memory.shape[1])
    weights, raw, groups, documents, valid = _dense(weights, raw, groups, documents, valid)
    after = memory.clone(memory_format=torch.contiguous_format)
    angle = weights.new_empty(*weights.shape, raw.shape[-1])
    kernels().phase_write(
        *pointers(weights, raw, groups, documents, valid, after, angle),
        *groups.shape, *memory.shape[1:], phase_bits, cumulative,
    )  # fmt: skip
    return angle, after


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::phase_write_backward", mutates_args=())
def _phase_write_backward(
    weights: Tensor,
    raw: Tensor,
    groups: Tensor,
    documents: Tensor | None,
    valid: Tensor | None,
    upstream: Tensor,
    group_count: int,
    cumulative: bool,
    scale_gradient: bool,
) -> tuple[Tensor, Tensor]:
    weights, raw, groups, documents, valid = _dense(weights, raw, groups, documents, valid)
    upstream = upstream.contiguous()
    slots, size = upstream.shape[2:]
    counts = None
    if scale_gradient:
        counts = torch.empty_like(groups)
        kernels().segment_counts(*pointers(groups, documents, valid, counts), *groups.shape, group_count)
    parts, grad_raw = weights.new_empty(-(-size // _PART), *weights.shape), torch.empty_like(raw)
    kernels().phase_write_backward(
        *pointers(weights, raw, groups, documents, valid, counts, upstream, parts, grad_raw),
        *groups.shape, group_count, slots, size, cumulative,
    )  # fmt: skip
    return parts.sum(0), grad_raw


def _dense(*tensors: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


@_phase_write.register_fake
def _(weights: Tensor, raw: Tensor, groups: Tensor, memory: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    after = torch.empty_like(memory, memory_format=torch.contiguous_format)
    return weights.new_empty(*weights.shape, raw.shape[-1]), after


@_phase_write_backward.register_fake
def _(weights: Tensor, raw: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return weights.new_empty(weights.shape), raw.new_empty(raw.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    weights, raw, groups, memory, documents, valid, _, ctx.cumulative, ctx.scale_gradient = inputs
    ctx.save_for_backward(weights, raw, groups, documents, valid)
    ctx.group_count = memory.shape[1]


def _gradient(ctx: Any, upstream: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = _phase_write_backward(*ctx.saved_tensors, upstream, ctx.group_count, ctx.cumulative, ctx.scale_gradient)
    return *found, None, None, None, None, None, None, None


_phase_write.register_autograd(_gradient, setup_context=_save)
