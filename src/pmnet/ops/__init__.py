"""Phase arithmetic: int32 turns, the segmented scan, and row-stable linear maps."""

from pmnet.ops.gather import lookup, take_rows
from pmnet.ops.linear import Linear, RMSNorm, row_stable_linear
from pmnet.ops.scan import phase_scan, phase_write
from pmnet.ops.turns import circular_difference, to_radians, to_turns

__all__ = [
    "Linear",
    "RMSNorm",
    "circular_difference",
    "lookup",
    "phase_scan",
    "phase_write",
    "row_stable_linear",
    "take_rows",
    "to_radians",
    "to_turns",
]
