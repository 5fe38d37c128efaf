"""Angles as integers: one turn is `2**32`, an int32 wraps exactly where a circle does.

A *turn count* is an int32 tensor; `2**31` and `-2**31` are the same half turn.
"""

import math

import torch
from torch import Tensor

RADIANS_PER_UNIT = 2 * math.pi / 2**32


def to_turns(angle: Tensor, phase_bits: int = 32) -> Tensor:
    """Round angles to the nearest multiple of `2**-phase_bits` turn.

    Args:
        angle: radians, any float dtype and any shape; computed in float64.
        phase_bits: b in 1..32. Angles below half a step become exactly 0 (the dead zone).

    Returns:
        int32 turns of the same shape, modulo one turn. NaN and infinity become 0.
    """
    steps = torch.round(angle.double() * (2**phase_bits / (2 * math.pi))).nan_to_num(0.0, 0.0, 0.0)
    steps = steps.remainder(2**phase_bits)  # exact, and within an int64 whatever the angle
    return (steps.to(torch.int64) << (32 - phase_bits)).to(torch.int32)  # int64 to int32 wraps


def to_radians(turns: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Radians in `[-pi, pi)` of int32 turns, computed in float64 and rounded once to `dtype`."""
    return (turns.double() * RADIANS_PER_UNIT).to(dtype)


def circular_difference(a: Tensor, b: Tensor) -> Tensor:
    """Signed distance `a - b` between two angles in radians, in `[-pi, pi]`."""
    difference = (a - b).double()
    return torch.atan2(difference.sin(), difference.cos())
