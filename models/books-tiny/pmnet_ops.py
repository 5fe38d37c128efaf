"""Phase arithmetic and everything whose bits must not depend on how a stream is cut."""

from .pmnet_ops_backend import BACKENDS, runs_native, runs_triton, use_backend
from .pmnet_ops_gather import lookup, take_rows
from .pmnet_ops_int8 import Int8Linear, quantize_int8
from .pmnet_ops_linear import Linear, row_stable_linear
from .pmnet_ops_phase import address, geometry, read_slots, to_angle
from .pmnet_ops_rows import RMSNorm, norm_rotate, rotary_table, silu_product
from .pmnet_ops_scan import phase_scan
from .pmnet_ops_turns import circular_difference, to_radians, to_turns
from .pmnet_ops_window_attention import window_attention
from .pmnet_ops_write import phase_write

__all__ = [
    "BACKENDS",
    "Int8Linear",
    "Linear",
    "RMSNorm",
    "address",
    "circular_difference",
    "geometry",
    "lookup",
    "norm_rotate",
    "phase_scan",
    "phase_write",
    "quantize_int8",
    "read_slots",
    "rotary_table",
    "row_stable_linear",
    "runs_native",
    "runs_triton",
    "silu_product",
    "take_rows",
    "to_angle",
    "to_radians",
    "to_turns",
    "use_backend",
    "window_attention",
]
