"""Compile every launch of the Triton kernels for GPUs, without having one. Run as a program: prints JSON.

The public functions are called on the CPU while launches are recorded instead of run, so that what is compiled is
what they would launch: same constants, block sizes and compiler options.
"""

import json
import os
import sys

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter has no compiler

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction, mangle_type

from pmnet.ops.scan import plan_segments
from pmnet.ops.triton.attention import attention_backward, attention_forward
from pmnet.ops.triton.read import read_forward
from pmnet.ops.triton.read_gradient import read_backward
from pmnet.ops.triton.scan import write_states
from pmnet.ops.triton.scan_gradient import write_gradient

SHAPES = {"published": (2, 300, 4, 512, 4), "odd": (1, 1, 3, 11, 3)}  # B, T, N, M, R
HOPPER, AMPERE = 90, 86  # compute capabilities: of the GPU that was measured, and one with less memory in its cores


def launch_all(shape: tuple[int, ...], dtype: torch.dtype, ragged: bool) -> None:
    batch, length, slots, size, heads = shape
    segments = torch.zeros(batch, length, dtype=torch.long)
    documents, valid = (segments, segments == 0) if ragged else (None, None)
    plan = plan_segments(segments, 4, documents, valid)
    weights, rotation = torch.zeros(batch, length, slots), torch.zeros(batch, length, size)
    state = torch.zeros(batch, 4, slots * size, dtype=torch.int32)
    states, _ = write_states(weights, rotation, plan.order, plan.start, segments, state, documents, valid, 7)
    write_gradient(states.float(), weights, rotation, plan.order, plan.start, plan.end, ragged)
    inputs = [
        torch.zeros(s, dtype=dtype)
        for s in ((batch, length, heads, size), (batch, length, slots, 2 * size), (heads * size, 2 * size))
    ]
    inputs.append(torch.zeros(heads * size, dtype=dtype))
    mixed, attention = read_forward(*inputs)
    read_backward(mixed, *inputs, attention)
    launch_attention((batch, length, heads, size // 8), dtype)


def launch_attention(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    batch, length, heads, width = shape
    span = torch.ones(batch, length, dtype=torch.long)
    query, keys = (torch.zeros(batch, n, heads, width, dtype=dtype) for n in (length, length + 127))
    out, softmax = attention_forward(query, keys, keys, span, 1.0)
    attention_backward(query, query, keys, keys, span, out, softmax, 1.0)


def compile_launch(target: int, kernel: JITFunction, args: tuple, options: dict) -> dict[str, object]:
    constants = {name: options.pop(name) for name in kernel.arg_names if name in options}
    values = dict(zip(kernel.arg_names, args, strict=False))
    constants |= {name: v for name, v in values.items() if v is None or (isinstance(v, int) and v == 1)}
    signature = {n: "constexpr" if n in constants else mangle_type(values[n]) for n in kernel.arg_names}
    aligned = [i for i, v in enumerate(args) if isinstance(v, Tensor) or (isinstance(v, int) and v % 16 == 0)]
    source = ASTSource(kernel, signature, constants, {(i,): [["tt.divisibility", 16]] for i in aligned})
    built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    return {"target": target, "kernel": kernel.__name__, "shared": built.metadata.shared, "ptx": built.asm["ptx"]}


def main() -> None:
    launches, target = [], HOPPER
    JITFunction.run = lambda self, *args, grid, warmup, **kwargs: launches.append((target, self, args, kwargs))
    launch_all(SHAPES["published"], torch.bfloat16, ragged=True)
    launch_all(SHAPES["odd"], torch.float32, ragged=False)
    launch_all(SHAPES["odd"], torch.float16, ragged=True)
    target = AMPERE
    launch_attention((1, 300, 2, 256), torch.bfloat16)
    launch_attention((1, 300, 2, 128), torch.float32)
    json.dump([compile_launch(*launch) for launch in launches], sys.stdout)


if __name__ == "__main__":
    main()
