"""Fused kernels of the write, the read and the window attention; `operators.py` makes operators with gradients of them.

`scan.py` and `scan_gradient.py` add up rotations, `read.py` and `read_gradient.py` attend over slots, `attention.py`
over the window. Only the modules of this folder import triton; `pmnet` itself does not need it.
"""
