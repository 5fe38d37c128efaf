"""One decode step in a single native call.

A step computes what a forward pass over one position computes, with the same kernels in the same order and hence the
same bits; it only leaves out the Python between them. It is taken when nothing could tell the difference: float32 on
the CPU, no gradient, no tracing, every module the library's own and without hooks.

Shapes: B rows, D hidden size, E head_dim.
"""

import ctypes
from array import array
from typing import Any

import torch
from torch import Tensor, nn

from pmnet.config import PMNetConfig
from pmnet.memory import MemoryRead, MemoryWrite
from pmnet.model.attention import SlidingWindowAttention, rotary_angles
from pmnet.model.block import PMNetBlock, SwiGLU
from pmnet.model.cache import PMNetCache, Ring
from pmnet.ops import Linear, RMSNorm, native
from pmnet.ops.linear import library_sums_in_order
from pmnet.ops.native import library
from pmnet.ops.phase import MOST_SLOTS

_NORMS = (
    ("input_layernorm",), ("self_attn", "q_norm"), ("self_attn", "k_norm"), ("post_attention_layernorm",),
    ("memory_read_module", "norm"), ("memory_write_module", "norm"),
)  # fmt: skip
_PRODUCTS = (
    *(("self_attn", name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
    *(("mlp", name) for name in ("gate_proj", "up_proj", "down_proj")),
    *(("memory_read_module", name) for name in ("proj_q", "proj_kv", "proj_out")),
    *(("memory_write_module", name) for name in ("proj_q", "proj_k", "proj_v", "proj_out")),
)
_PARTS = {"self_attn": SlidingWindowAttention, "mlp": SwiGLU, "memory_read_module": MemoryRead,
          "memory_write_module": MemoryWrite}  # fmt: skip


class _Model(ctypes.Structure):
    """`Model` of ops/native/step.cpp."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "rows hidden intermediate heads kv_heads width window slots size read_heads bits cumulative layers period "
            "buffer offset"
        ).split()
    ] + [("eps", ctypes.c_float), ("scale", ctypes.c_float)]


class _Unusual(Exception):
    """A module is not what the native code stands for."""


def try_step(
    config: PMNetConfig,
    layers: nn.ModuleList,
    anchors: nn.ParameterList,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: PMNetCache,
) -> Tensor | None:
    """Read one position per row and advance `cache`.

    Args:
        config, layers, anchors: of the model, which is in eval mode.
        hidden: embeddings `[B, 1, D]`.
        attention_mask, position_ids: as in `PMNetModel.forward`.
        cache: the state to continue.

    Returns:
        What the last layer returns, `[B, 1, D]`; None, with nothing changed, if this call needs the general path.
    """
    if not _applies(config, hidden, attention_mask, position_ids, cache):
        return None
    try:
        pointers = [pointer for layer in layers for pointer in _pointers_of(layer)]
    except _Unusual:
        return None
    positions = cache.next_position.unsqueeze(1) if position_ids is None else position_ids.expand(hidden.shape[0], 1)
    cos, sin = rotary_angles(config, positions, hidden.dtype)
    span = (cache.in_document + 1).clamp(max=config.sliding_window)
    cache.memory = [memory.contiguous() for memory in cache.memory]
    ring = cache.ring()
    table, size = array("Q"), len(pointers) // len(layers)
    for i, buffer in enumerate(ring.buffers):
        table.extend(pointers[i * size : (i + 1) * size])
        table.extend((buffer.keys.data_ptr(), buffer.values.data_ptr()))
    levels = array("Q")
    for anchor, memory in zip(anchors, cache.memory, strict=True):
        levels.extend((_float(anchor), memory.data_ptr(), memory.shape[1]))
    out, model = hidden.contiguous().clone(), _describe(config, hidden.shape[0], ring.offset)
    kernels: Any = library()
    kernels.decode_step(
        out.data_ptr(), cos.data_ptr(), sin.data_ptr(), span.data_ptr(), table.buffer_info()[0],
        levels.buffer_info()[0], ctypes.addressof(model),
    )  # fmt: skip
    ring.offset += 1
    cache.seen = cache.seen + 1
    cache.in_document = cache.in_document + 1
    cache.next_position = positions.squeeze(1) + 1
    cache.columns += 1
    return out


def _applies(
    config: PMNetConfig,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: PMNetCache,
) -> bool:
    if torch.compiler.is_compiling() or torch.is_grad_enabled() or not native(hidden) or not library_sums_in_order():
        return False
    if config._attn_implementation not in ("eager", "sdpa") or config.num_memory > MOST_SLOTS:
        return False
    if attention_mask is not None and not bool(attention_mask[:, -1:].all()):
        return False
    # a position that does not increase starts a new document: the general path's business
    return position_ids is None or bool((position_ids >= cache.next_position.unsqueeze(1)).all())


def _describe(config: PMNetConfig, rows: int, offset: int) -> _Model:
    return _Model(
        rows, config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads,
        config.head_dim, config.sliding_window, config.num_memory, config.memory_size, config.num_memory_read_heads,
        config.phase_bits, config.memory_cumsum, config.num_hidden_layers, config.memory_write_period,
        config.sliding_window - 1 + Ring.ROOM, offset, config.rms_norm_eps, config.head_dim**-0.5,
    )  # fmt: skip


def _pointers_of(layer: nn.Module) -> list[int]:
    """Addresses of one layer's weights in the order of `Layer` in step.cpp; 0 for what is absent."""
    _check(layer, PMNetBlock)
    parts = layer._modules
    for name, kind in _PARTS.items():
        if name in parts:
            _check(parts[name], kind)
    found: list[int] = []
    for path in _NORMS:
        module = _follow(parts, path)
        if module is not None:
            _check(module, RMSNorm)
        found.append(0 if module is None else _float(module._parameters["weight"]))
    for path in _PRODUCTS:
        module = _follow(parts, path)
        if module is None:
            found += (0, 0, 0)
        else:
            _check(module, Linear)
            weights = module._parameters
            found += (_float(weights["weight"]), 0, 0 if weights["bias"] is None else _float(weights["bias"]))
    return found


def _follow(parts: dict[str, nn.Module | None], path: tuple[str, ...]) -> nn.Module | None:
    module = parts.get(path[0])
    return module if module is None or len(path) == 1 else module._modules[path[1]]


def _check(module: nn.Module | None, kind: type) -> None:
    if type(module) is not kind or module._forward_hooks or module._forward_pre_hooks:
        raise _Unusual


def _float(tensor: Tensor | None) -> int:
    if tensor is None or tensor.dtype != torch.float32 or not tensor.is_contiguous():
        raise _Unusual
    return tensor.data_ptr()
