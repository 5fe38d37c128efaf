"""A step: the next positions of every row, all layers in a single native call.

A step computes what the modules compute, with the same kernels in the same order and hence the same bits; it only
leaves out the Python between them. It is taken when nothing could tell the difference: float32 on the CPU, no gradient,
no tracing, no padding, every module the library's own and without hooks. A long chunk is read in several steps, so that
what lies between the layers stays small.

Shapes: B rows, T positions, D hidden size, E head_dim.
"""

import ctypes
from array import array
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from .pmnet_config import PMNetConfig
from .pmnet_memory import MemoryRead, MemoryWrite
from .pmnet_model_attention import PastKeys, SlidingWindowAttention
from .pmnet_model_block import PMNetBlock, SwiGLU
from .pmnet_model_cache import PMNetCache
from .pmnet_model_ring import Ring
from .pmnet_ops import Int8Linear, Linear, RMSNorm, native
from .pmnet_ops_backend import direct
from .pmnet_ops_linear import plain
from .pmnet_ops_native import library
from .pmnet_ops_phase import MOST_SLOTS

_CONFIGURED = (
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
    "num_memory", "memory_size", "num_memory_read_heads", "phase_bits", "memory_cumsum", "num_hidden_layers",
    "memory_write_period",
)  # fmt: skip


_POSITIONS = 1024  # of all rows together, in one step


class _Model(ctypes.Structure):
    """`Model` of ops/native/step.cpp."""

    _integers = (
        "rows length hidden intermediate heads kv_heads width window slots size read_heads bits cumulative layers "
        "period buffer offset"
    )
    _fields_ = [
        *((name, ctypes.c_int64) for name in _integers.split()),
        ("theta", ctypes.c_double),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


class _Unusual(Exception):
    """A module is not what the native code stands for."""


def try_step(
    config: PMNetConfig,
    layers: nn.ModuleList,
    anchors: nn.ParameterList,
    norm: nn.Module,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cache: PMNetCache | None,
) -> Tensor | None:
    """Read T positions per row and advance `cache`.

    Args:
        config, layers, anchors, norm: of the model, which is in eval mode.
        hidden: embeddings `[B, T, D]`.
        attention_mask, position_ids: as in `PMNetModel.forward`.
        cache: the state to continue; None for a fresh one that is not kept.

    Returns:
        The hidden states after the final norm, `[B, T, D]`; None, with nothing changed, if this call needs the
        general path.
    """
    if not _applies(config, hidden):
        return None
    cache = cache or PMNetCache(config, hidden.shape[0])
    if not _continues(hidden, attention_mask, position_ids, cache):
        return None
    values = vars(config)  # attributes of a configuration are slow
    try:
        sizes = _sizes(values)
        weights = [_pointers_of(layer, *sizes) for layer in layers]
        _check(norm, RMSNorm)
        final, tables = _float(norm._parameters["weight"], hidden.shape[2]), [_float(anchor) for anchor in anchors]
        if cache.dtype != torch.float32:
            return None
    except _Unusual:
        return None
    if position_ids is not None:
        cache.next_position = position_ids[:, 0].expand(hidden.shape[0]).long().clone()
    cache.memory = [memory.contiguous() for memory in cache.memory]
    cache.seen, cache.in_document = cache.seen.contiguous(), cache.in_document.contiguous()
    cache.next_position = cache.next_position.contiguous()
    per_level = array("Q")
    for table, memory in zip(tables, cache.memory, strict=True):
        per_level.extend((table, memory.data_ptr(), memory.shape[1]))
    if hidden.shape[1] == 1:
        return _step(hidden, cache, weights, per_level, final, values)
    parts = hidden.split(max(1, _POSITIONS // hidden.shape[0]), dim=1)
    out = torch.cat([_step(part, cache, weights, per_level, final, values) for part in parts], dim=1)
    # copies: the buffers of a long step are not worth keeping
    cache.window = [PastKeys(keys.clone(), past_values.clone()) for keys, past_values in cache.window]
    return out


def _step(
    hidden: Tensor,
    cache: PMNetCache,
    weights: list[list[int]],
    per_level: "array[int]",
    final: int,
    values: Mapping[str, Any],
) -> Tensor:
    """The native call, and what it cannot do itself: place for new keys, and the count of columns."""
    length = hidden.shape[1]
    ring, per_layer = cache.ring(length), array("Q")
    for found, buffer in zip(weights, ring.buffers, strict=True):
        per_layer.extend(found)
        per_layer.extend((buffer.keys.data_ptr(), buffer.values.data_ptr()))
    out, model = hidden.clone(memory_format=torch.contiguous_format), _describe(values, hidden, ring)
    kernels: Any = library()
    kernels.step(
        out.data_ptr(), cache.seen.data_ptr(), cache.in_document.data_ptr(), cache.next_position.data_ptr(),
        per_layer.buffer_info()[0], per_level.buffer_info()[0], final, ctypes.addressof(model),
    )  # fmt: skip
    ring.offset += length
    cache.columns += length
    return out


def _applies(config: PMNetConfig, hidden: Tensor) -> bool:
    if not direct(hidden) or not native(hidden) or not hidden.numel():
        return False
    if config._attn_implementation not in ("eager", "sdpa") or config.num_memory > MOST_SLOTS:
        return False
    return not (hooks._global_forward_hooks or hooks._global_forward_pre_hooks)


def _continues(hidden: Tensor, attention_mask: Tensor | None, position_ids: Tensor | None, cache: PMNetCache) -> bool:
    """Whether every row goes on where it stands, or further on: the rest is the general path's business.

    That is padding, wrong shapes, and a position that does not increase (a new document).
    """
    rows, length = hidden.shape[:2]
    if attention_mask is not None and (
        attention_mask.dim() != 2
        or attention_mask.shape[0] != rows
        or attention_mask.shape[1] < length
        or not bool(attention_mask[:, -length:].all())
    ):
        return False
    if position_ids is None:
        return True
    if tuple(position_ids.shape) not in ((rows, length), (1, length)):
        return False
    first = position_ids[:, :1]
    if length > 1 and not torch.equal(position_ids, first + torch.arange(length)):
        return False
    return bool((first >= cache.next_position.unsqueeze(1)).all())


def _describe(values: Mapping[str, Any], hidden: Tensor, ring: Ring) -> _Model:
    buffer, scale = values["sliding_window"] - 1 + ring.room, values["head_dim"] ** -0.5
    numbers = (values[name] for name in _CONFIGURED)
    rows, length = hidden.shape[:2]
    return _Model(rows, length, *numbers, buffer, ring.offset, values["rope_theta"], values["rms_norm_eps"], scale)


def _sizes(values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Numbers in the weights of the norms and of the products, in the order of `_pointers_of`."""
    hidden, inner, heads, kv_heads, width, _, _, size, read_heads, *_ = (values[name] for name in _CONFIGURED)
    read = read_heads * size
    return [hidden, width, width, hidden, hidden, hidden], [
        hidden * heads * width, hidden * kv_heads * width, hidden * kv_heads * width, heads * width * hidden,
        hidden * inner, hidden * inner, inner * hidden, hidden * read, 4 * size * read, read * hidden,
        hidden * size, 2 * size * size, hidden * size, size * size,
    ]  # fmt: skip


def _pointers_of(layer: nn.Module, norm_sizes: list[int], product_sizes: list[int]) -> list[int]:
    """Addresses of one layer's weights in the order of `Layer` in step.cpp; 0 for what is absent."""
    _check(layer, PMNetBlock)
    parts = layer._modules
    attention, mlp = _inside(parts["self_attn"], SlidingWindowAttention), _inside(parts["mlp"], SwiGLU)
    read = _inside(parts["memory_read_module"], MemoryRead)
    write = _inside(parts["memory_write_module"], MemoryWrite) if "memory_write_module" in parts else {}
    norms = [parts["input_layernorm"], attention["q_norm"], attention["k_norm"], parts["post_attention_layernorm"],
             read["norm"], write.get("norm")]  # fmt: skip
    products = [attention["q_proj"], attention["k_proj"], attention["v_proj"], attention["o_proj"],
                mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"], read["proj_q"], read["proj_kv"], read["proj_out"],
                write.get("proj_q"), write.get("proj_k"), write.get("proj_v"), write.get("proj_out")]  # fmt: skip
    reader = parts["memory_read_module"]
    assert isinstance(reader, MemoryRead)
    if type(read["proj_kv"]) is Int8Linear and read["proj_kv"].out_features % (2 * 16 * reader.heads):
        raise _Unusual  # the values of a head would begin inside a panel
    found = []
    for norm, count in zip(norms, norm_sizes, strict=True):
        if norm is not None:
            _check(norm, RMSNorm)
        found.append(0 if norm is None else _float(norm._parameters["weight"], count))
    for product, count in zip(products, product_sizes, strict=True):
        if product is None:
            found += (0, 0, 0)
            continue
        if type(product) is Int8Linear:
            found += _int8(product, count)
            continue
        _check(product, Linear)
        bias = product._parameters["bias"]
        found += (_float(product._parameters["weight"], count), 0, 0 if bias is None else _float(bias))
    return found


def _int8(product: Int8Linear, count: int) -> tuple[int, int, int]:
    _check(product, Int8Linear)
    if product.out_features * product.in_features != count:
        raise _Unusual
    tensors = product._buffers  # attributes of a module are slow
    panels, bias = tensors["panels"], tensors["bias"]
    assert panels is not None
    return panels.data_ptr(), _float(tensors["scale"]), 0 if bias is None else _float(bias)


def _inside(module: nn.Module | None, kind: type) -> dict[str, nn.Module | None]:
    _check(module, kind)
    return {} if module is None else module._modules


def _check(module: nn.Module | None, kind: type) -> None:
    if module is None or type(module) is not kind or not plain(module):
        raise _Unusual


def _float(tensor: Tensor | None, count: int | None = None) -> int:
    if tensor is None or tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise _Unusual
    if count is not None and tensor.numel() != count:  # a part was replaced: the configuration is no longer its size
        raise _Unusual
    return tensor.data_ptr()
