"""Causal sliding-window attention (docs/model.md, a layer).

Shapes: B, T, D hidden size, H query heads, K key/value heads, E head_dim, W window.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .pmnet_config import PMNetConfig
from .pmnet_model_window import Window
from .pmnet_ops import Linear, RMSNorm, norm_rotate, window_attention


class PastKeys(NamedTuple):
    """Keys (already rotated) and values of the `W - 1` positions before a chunk, `[B, W - 1, K, E]` each."""

    keys: Tensor
    values: Tensor


class SlidingWindowAttention(nn.Module):
    """Grouped-query attention over W keys, the current one included, with RMSNorm on query and key heads."""

    def __init__(self, config: PMNetConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx, self.is_causal = config, layer_idx, False
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.num_key_value_groups = heads // kv_heads
        self.scaling = width**-0.5
        self.q_proj = Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = Linear(config.hidden_size, kv_heads * width, bias=False)
        self.v_proj = Linear(config.hidden_size, kv_heads * width, bias=False)
        self.o_proj = Linear(heads * width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.k_norm = RMSNorm(width, eps=config.rms_norm_eps)

    def forward(
        self, hidden: Tensor, rotary: tuple[Tensor, Tensor], window: Window, past: PastKeys | None
    ) -> tuple[Tensor, PastKeys]:
        """Attend within the window.

        Args:
            hidden: `[B, T, D]`.
            rotary: cosines and sines of the T positions, `[B or 1, T, 1, E]` each.
            window: what each position of the chunk sees.
            past: keys and values before the chunk; None when there are none.

        Returns:
            `[B, T, D]`, and the keys and values that the next chunk needs.
        """
        query, key, value = (
            projection(hidden).unflatten(-1, (-1, self.config.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query = norm_rotate(query, self.q_norm, *rotary).to(value.dtype)
        key = norm_rotate(key, self.k_norm, *rotary).to(value.dtype)

        if past is None:
            empty = value.new_zeros(value.shape[0], window.width - 1, *value.shape[2:])
            past = PastKeys(empty, empty)
        keys = torch.cat([past.keys.to(value.dtype), key], dim=1)
        values = torch.cat([past.values.to(value.dtype), value], dim=1)

        after = PastKeys(window.tail(keys), window.tail(values))
        if window.blocks is None:
            mixed = window_attention(query, keys, values, window.span, self.scaling)
            return self.o_proj(mixed.flatten(2)), after
        blocks = window.blocks
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        dropout = self.config.attention_dropout if self.training else 0.0
        mixed, _ = attend(
            self, blocks.queries(query), blocks.keys(keys), blocks.keys(values), blocks.allowed,
            dropout=dropout, scaling=self.scaling,
        )  # fmt: skip
        return self.o_proj(blocks.positions(mixed)), after


def eager_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    dropout: float = 0.0,
    scaling: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Plain attention behind the `transformers` interface.

    Args:
        module: the calling attention layer.
        query: `[B, H, Q, E]`.
        key, value: `[B, K, J, E]`.
        attention_mask: bool, True where a query may look, `[B, 1, Q, J]`.
        dropout, scaling: as in `torch.nn.functional.scaled_dot_product_attention`.

    Returns:
        `[B, Q, H, E]` and the attention weights `[B, H, Q, J]`.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = (query @ key.transpose(2, 3)) * scaling
    scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(value.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ value).transpose(1, 2), weights
