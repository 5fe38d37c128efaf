"""Fused kernels of the write and the read: forward and backward as plain functions, without autograd.

`scan.py` adds up rotations (`write_states`, `write_gradient`), `read.py` attends over slots (`read_forward`,
`read_backward`). Only these two modules import triton; `pmnet` itself does not need it.
"""
