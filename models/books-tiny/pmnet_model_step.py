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
from .pmnet_model_attention import PastKeys
from .pmnet_model_cache import PMNetCache
from .pmnet_model_ring import Ring
from .pmnet_model_weights import CONFIGURED, Weights, weights_of
from .pmnet_ops import runs_native
from .pmnet_ops_backend import direct
from .pmnet_ops_native import library
from .pmnet_ops_phase import MOST_SLOTS

_POSITIONS = 1024  # of all rows together, in one step


class _Model(ctypes.Structure):
    """`Model` of ops/native/step.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("rows", "length", *CONFIGURED, "buffer", "offset")),
        ("theta", ctypes.c_double),
        ("eps", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


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
    cache = cache or PMNetCache(config, hidden.shape[0], device=hidden.device)
    if not _continues(hidden, attention_mask, position_ids, cache):
        return None
    weights = weights_of(config, layers, anchors, norm)
    if weights is None or cache.dtype != torch.float32:
        return None
    if position_ids is not None:
        cache.next_position = position_ids[:, 0].expand(hidden.shape[0]).long().clone()
    cache.memory = [memory.contiguous() for memory in cache.memory]
    cache.seen, cache.in_document = cache.seen.contiguous(), cache.in_document.contiguous()
    cache.next_position = cache.next_position.contiguous()
    per_level = array("Q")
    for table, memory in zip(weights.anchors, cache.memory, strict=True):
        per_level.extend((table, memory.data_ptr(), memory.shape[1]))
    values = vars(config)  # attributes of a configuration are slow
    if hidden.shape[1] == 1:
        return _step(hidden, cache, weights, per_level, values)
    parts = hidden.split(max(1, _POSITIONS // hidden.shape[0]), dim=1)
    out = torch.cat([_step(part, cache, weights, per_level, values) for part in parts], dim=1)
    # copies: the buffers of a long step are not worth keeping
    cache.window = [PastKeys(keys.clone(), past_values.clone()) for keys, past_values in cache.window]
    return out


def _step(
    hidden: Tensor,
    cache: PMNetCache,
    weights: Weights,
    per_level: "array[int]",
    values: Mapping[str, Any],
) -> Tensor:
    """The native call, and what it cannot do itself: place for new keys, and the count of columns."""
    length = hidden.shape[1]
    ring, per_layer = cache.ring(length), array("Q")
    for found, buffer in zip(weights.layers, ring.buffers, strict=True):
        per_layer.extend(found)
        per_layer.extend((buffer.keys.data_ptr(), buffer.values.data_ptr()))
    out, model = hidden.clone(memory_format=torch.contiguous_format), _describe(values, hidden, ring)
    kernels: Any = library()
    try:
        kernels.step(
            out.data_ptr(), cache.seen.data_ptr(), cache.in_document.data_ptr(), cache.next_position.data_ptr(),
            per_layer.buffer_info()[0], per_level.buffer_info()[0], weights.norm, ctypes.addressof(model),
        )  # fmt: skip
    finally:  # Ctrl-C is raised when the kernel has returned: the state has moved
        ring.offset += length
        cache.columns += length
    return out


def _applies(config: PMNetConfig, hidden: Tensor) -> bool:
    if not direct(hidden) or not runs_native(hidden) or not hidden.numel():
        return False
    if config._attn_implementation not in ("eager", "sdpa") or vars(config)["num_memory"] > MOST_SLOTS:
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
    if tuple(position_ids.shape) not in ((rows, length), (1, length)) or position_ids.is_floating_point():
        return False
    first = position_ids[:, :1]
    if length > 1 and not torch.equal(position_ids, first + torch.arange(length, device=first.device)):
        return False
    return bool((first >= cache.next_position.unsqueeze(1)).all())


def _describe(values: Mapping[str, Any], hidden: Tensor, ring: Ring) -> _Model:
    buffer, scale = values["sliding_window"] - 1 + ring.room, values["head_dim"] ** -0.5
    numbers = (values[name] for name in CONFIGURED)
    rows, length = hidden.shape[:2]
    return _Model(rows, length, *numbers, buffer, ring.offset, values["rope_theta"], values["rms_norm_eps"], scale)
