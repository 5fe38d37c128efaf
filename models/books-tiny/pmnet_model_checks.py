"""Argument checks of the model's forward pass: one sentence each."""

from typing import Any

import torch
from torch import Tensor, nn

from .pmnet_config import PMNetConfig
from .pmnet_model_cache import PMNetCache
from .pmnet_ops_backend import readable

_INTEGERS = (torch.int64, torch.int32)


def check_ids(ids: Tensor, vocab_size: int) -> None:
    """ValueError unless ids are int64 or int32 `[B, T]` in `[0, vocab_size)`."""
    if ids.dtype not in _INTEGERS:
        raise ValueError(f"input_ids must be int64 or int32, got {ids.dtype}")
    if ids.dim() != 2 or ids.shape[1] == 0:
        raise ValueError(f"input_ids must be [batch, positions] with at least one position, got {tuple(ids.shape)}")
    if ids.numel() and readable(ids):
        low, high = (int(x) for x in torch.aminmax(ids))
        if low < 0 or high >= vocab_size:
            raise ValueError(f"input_ids must lie in [0, {vocab_size}), got {low if low < 0 else high}")


def check_hidden(hidden: Tensor, config: PMNetConfig) -> None:
    """ValueError unless embeddings are floating `[B, T, D]` of at least one position."""
    if hidden.dim() != 3 or hidden.shape[1] == 0 or hidden.shape[2] != config.hidden_size:
        wanted = f"[batch, positions, {config.hidden_size}]"
        raise ValueError(f"inputs_embeds (or the embedding) must be {wanted}, got {tuple(hidden.shape)}")
    if not hidden.is_floating_point():
        raise ValueError(f"inputs_embeds must be floating, got {hidden.dtype}")


def check_kept(keep: int | Tensor, length: int) -> None:
    """ValueError for an index of logits beyond the `length` of them: found later, the state would have moved."""
    if not isinstance(keep, Tensor) or keep.dtype not in _INTEGERS or not keep.numel():
        return
    if readable(keep):
        low, high = (int(x) for x in torch.aminmax(keep))
        if low < -length or high >= length:
            wrong = low if low < -length else high
            raise ValueError(f"logits_to_keep must lie in [{-length}, {length}), got {wrong}")


def check_labels(labels: Tensor, vocab_size: int, ignored: int, given: torch.Size, keep: int | Tensor) -> None:
    """ValueError unless labels are int64, one for each logit that is kept of those given, and each an id or ignored.

    Found later, the state would have moved already.
    """
    batch, length = given
    if isinstance(keep, Tensor):
        length = keep.shape[0]
    elif keep:
        length = min(keep, length)
    if labels.dtype != torch.int64 or labels.shape != (batch, length):
        wanted = f"int64 [{batch}, {length}], one for each logit"
        raise ValueError(f"labels must be {wanted}, got {labels.dtype} {tuple(labels.shape)}")
    if readable(labels):
        wrong = labels[(labels != ignored) & ((labels < 0) | (labels >= vocab_size))]
        if wrong.numel():
            raise ValueError(f"labels must lie in [0, {vocab_size}) or be {ignored}, got {int(wrong[0])}")


def check_sizes(layers: nn.ModuleList, anchors: nn.ParameterList, config: PMNetConfig) -> None:
    """ValueError unless there are as many layers and levels as configured, and anchors of the configured shape."""
    if len(layers) != config.num_hidden_layers or len(anchors) != config.num_levels:
        raise ValueError(
            f"this model has {len(layers)} layers and anchors of {len(anchors)} levels, but its configuration "
            f"num_hidden_layers {config.num_hidden_layers} and {config.num_levels} levels"
        )
    for level, anchor in enumerate(anchors):
        if anchor.shape != config.memory_shape(level):
            raise ValueError(
                f"anchors of level {level} must be {config.memory_shape(level)}, got {tuple(anchor.shape)}"
            )


def check_others(position_ids: Tensor | None, document_ids: Tensor | None, others: dict[str, Any]) -> None:
    """ValueError if only the keywords of other kernels say where packed documents begin, or attention is asked for."""
    if others.get("output_attentions"):
        raise ValueError("a PMNet returns no attention weights (output_attentions)")
    told = sorted({"cu_seq_lens_q", "seq_idx"} & set(others))
    if told and position_ids is None and document_ids is None:
        raise ValueError(f"{told[0]} alone does not tell packed documents apart: give position_ids or document_ids")


def check_cache(cache: PMNetCache, config: PMNetConfig, hidden: Tensor) -> None:
    """ValueError unless the state belongs to this model, batch and device."""
    if not isinstance(cache, PMNetCache):
        raise ValueError(f"past_key_values must be a PMNetCache, got {type(cache).__name__}")
    if not torch.compiler.is_compiling():
        cache.check_fits(config, hidden.shape[0])
        if cache.seen.device != hidden.device:
            raise ValueError(f"this state is on {cache.seen.device}, the model on {hidden.device}: use .to()")
