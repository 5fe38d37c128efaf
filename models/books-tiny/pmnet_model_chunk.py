"""What a call of the model means for each row: which columns are real, where they stand, which document they are in.

Real positions are moved to the front of their row before the first layer and back after the last, so that inside
the model padding only ever stands at the end, where causality makes it harmless.

Shapes: B rows, T columns of this call.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .pmnet_config import PMNetConfig
from .pmnet_memory import Tokens
from .pmnet_model_attention import PastKeys
from .pmnet_model_cache import PMNetCache
from .pmnet_model_window import Window, plan_window, positions_within
from .pmnet_ops import runs_native, runs_triton, take_rows


@dataclass(frozen=True)
class Chunk:
    """One call, row by row. Everything but `restore` speaks of compacted rows."""

    columns: int  # T
    order: Tensor | None  # [B, T] compacted place -> column; None when every column is real
    place: Tensor | None  # [B, T] column -> compacted place
    counts: Tensor | None  # [B] real positions of each row
    positions: Tensor  # [B or 1, T] rotary positions
    tokens: Tokens
    window: Window

    def compact(self, x: Tensor) -> Tensor:
        """Columns `[B, T, ...]` in compacted order."""
        return x if self.order is None else take_rows(x, self.order)

    def restore(self, x: Tensor) -> Tensor:
        """Compacted `[B, T, ...]` back in the order of the columns."""
        return x if self.place is None else take_rows(x, self.place)

    def advance(self, cache: PMNetCache, memory: list[Tensor], window: list[PastKeys]) -> None:
        """Move `cache` past this chunk, in place."""
        # copies: the tails are views, and would keep the keys of the whole chunk alive
        kept = [
            PastKeys(new.keys.to(old.keys.dtype, copy=True), new.values.to(old.values.dtype, copy=True))
            for old, new in zip(cache.window, window, strict=True)
        ]
        read = self.columns if self.counts is None else self.counts
        if self.tokens.documents is None:
            in_document, next_position = cache.in_document + read, cache.next_position + read
        else:
            documents, valid = self.tokens.documents, self.tokens.valid
            current = documents == documents[:, -1:]
            current = current if valid is None else current & valid
            continued = documents[:, -1] == 0
            in_document = current.sum(1) + torch.where(continued, cache.in_document, 0)
            last = self.positions.masked_fill(~current, torch.iinfo(torch.int64).min).amax(1) + 1
            next_position = torch.where(current.any(1), last, cache.next_position)
        cache.replace(memory, kept, (cache.seen + read, in_document, next_position), cache.columns + self.columns)


def read_chunk(
    config: PMNetConfig,
    hidden: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    document_ids: Tensor | None,
    cache: PMNetCache | None,
    dropout: float,
) -> Chunk:
    """Work out the chunk that `hidden` `[B, T, D]` stands for; see `PMNetModel.forward` for the arguments.

    `dropout` is that of the attention weights; with any, the attention of this package is not used.

    Raises:
        ValueError: if a mask or ids have another shape than the input.
    """
    batch, length = hidden.shape[:2]
    device = hidden.device
    order = place = counts = valid = None
    if attention_mask is not None:
        if attention_mask.dim() != 2 or attention_mask.shape[0] != batch or attention_mask.shape[1] < length:
            raise ValueError(f"attention_mask must be [{batch}, {length}], got {tuple(attention_mask.shape)}")
        valid = attention_mask[:, -length:] != 0
        counts = valid.sum(1)
        order = torch.sort(~valid, dim=1, stable=True).indices
        columns = torch.arange(length, device=device)
        place = torch.empty_like(order).scatter_(1, order, columns.expand_as(order))
        valid = columns < counts.unsqueeze(1)

    def compacted(name: str, ids: Tensor) -> Tensor:
        if ids.dim() != 2 or ids.shape[0] not in (1, batch) or ids.shape[1] != length:
            raise ValueError(f"{name} must be [{batch}, {length}], got {tuple(ids.shape)}")
        if ids.is_floating_point():
            raise ValueError(f"{name} must be integers, got {ids.dtype}")
        rows = ids.long().expand(batch, length)
        return rows if order is None else rows.gather(1, order)

    past = None if cache is None or cache.columns == 0 else cache
    expected = None if past is None else past.next_position.unsqueeze(1)
    starts = None if document_ids is None else changes(compacted("document_ids", document_ids))
    if position_ids is not None:
        positions = compacted("position_ids", position_ids)
        restarts = _restarts(positions, expected)
        starts = restarts if starts is None else starts | restarts
    elif starts is not None:
        positions = positions_within(starts, expected)
    else:
        positions = torch.arange(length, device=device).unsqueeze(0)
        positions = positions if expected is None else positions + expected
    documents = None
    if starts is not None:
        documents = (starts if valid is None else starts & valid).long().cumsum(1)

    fused = config._attn_implementation in ("eager", "sdpa") and dropout == 0.0
    fused = fused and (runs_native(hidden) or (runs_triton(hidden) and hidden.dtype != torch.float64))
    window = plan_window(
        config.sliding_window,
        (batch, length),
        device,
        None if past is None else past.seen,
        None if past is None else past.in_document,
        counts,
        documents,
        in_blocks=not fused,
    )
    return Chunk(length, order, place, counts, positions, Tokens(valid, documents), window)


def _restarts(positions: Tensor, expected: Tensor | None) -> Tensor:
    """Bool `[B, T]`: the position does not exceed the one before it (the cache's last one, for the first)."""
    if expected is None:
        expected = positions[:, :1]
    return positions < torch.cat([expected, positions[:, :-1] + 1], dim=1)


def changes(ids: Tensor) -> Tensor:
    """Bool `[B, T]`: the id differs from the one before it; the first never does."""
    return ids != torch.cat([ids[:, :1], ids[:, :-1]], dim=1)
