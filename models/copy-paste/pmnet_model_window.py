"""What each position of a chunk sees of the sliding window, and the layout of attention in blocks.

A position sees the last `span` positions of its document, itself included, `W` at most. The attention of this package
(native and Triton) needs no more than that. Other attention kernels get blocks of `BLOCK` queries at multiples of
`BLOCK` of the stream's own position count, whatever chunk a position arrives in, each with one window of
`BLOCK + W - 1` keys: cost T*W with every kernel, and a position always has the same place in a kernel call of the same
shape, so that results are the same bits in any chunking.

Shapes: B, T new positions, W window, S blocks, J = BLOCK + W - 1 keys of a block, H heads, E head_dim.
The *buffer* of keys holds the `W - 1` positions before the chunk, then the T new ones.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .pmnet_ops import take_rows

BLOCK = 16


@dataclass(frozen=True)
class Blocks:
    """Where queries and keys of one chunk go. Index tensors are None when every row starts a fresh stream."""

    count: int  # S
    length: int  # T
    size: int  # J
    allowed: Tensor  # [B * S, 1, BLOCK, J] bool
    query_index: Tensor | None = None  # [B, S * BLOCK] chunk position of every query slot
    slot_index: Tensor | None = None  # [B, T] query slot of every chunk position
    key_index: Tensor | None = None  # [B, S * J] buffer place of every key slot

    def to(self, device: torch.device, non_blocking: bool = False) -> "Blocks":
        """The same on another device."""
        return _moved(self, device, non_blocking)

    def queries(self, x: Tensor) -> Tensor:
        """`[B, T, H, E]` to `[B * S, H, BLOCK, E]`."""
        if self.query_index is None:
            x = F.pad(x, (0, 0, 0, 0, 0, self.count * BLOCK - self.length))
        else:
            x = take_rows(x, self.query_index)
        return x.reshape(x.shape[0] * self.count, BLOCK, *x.shape[2:]).transpose(1, 2)

    def keys(self, buffer: Tensor) -> Tensor:
        """`[B, W - 1 + T, H, E]` to `[B * S, H, J, E]`."""
        if self.key_index is None:
            padded = F.pad(buffer, (0, 0, 0, 0, 0, self.count * BLOCK - self.length))
            windows = padded.unfold(1, self.size, BLOCK).movedim(-1, 3)  # [B, S, H, J, E]
            return windows.flatten(0, 1)
        rows = take_rows(buffer, self.key_index)
        return rows.view(buffer.shape[0] * self.count, self.size, *buffer.shape[2:]).transpose(1, 2)

    def positions(self, y: Tensor) -> Tensor:
        """`[B * S, BLOCK, H, E]` back to `[B, T, H * E]`."""
        y = y.reshape(y.shape[0] // self.count, self.count * BLOCK, y.shape[2] * y.shape[3])
        return y[:, : self.length] if self.slot_index is None else take_rows(y, self.slot_index)


@dataclass(frozen=True)
class Window:
    """What the positions of one chunk see."""

    width: int  # W
    length: int  # T
    span: Tensor  # [B or 1, T] int64, positions seen, in 1..W
    tail_index: Tensor | None  # [B, W - 1] buffer places the next chunk needs; None: the last ones
    blocks: Blocks | None  # None for the attention of this package

    def to(self, device: torch.device, non_blocking: bool = False) -> "Window":
        """The same on another device: what `accelerate` asks for where layers are spread over devices."""
        return _moved(self, device, non_blocking)

    def tail(self, buffer: Tensor) -> Tensor:
        """The `W - 1` places of the buffer that the next chunk can still see, `[B, W - 1, H, E]`."""
        return buffer[:, self.length :] if self.tail_index is None else take_rows(buffer, self.tail_index)


def _moved(plan: Any, device: torch.device, non_blocking: bool) -> Any:
    tensors = {name: part for name, part in vars(plan).items() if isinstance(part, Tensor | Blocks)}
    return replace(plan, **{name: part.to(device, non_blocking=non_blocking) for name, part in tensors.items()})


def plan_window(
    width: int,
    shape: tuple[int, int],
    device: torch.device,
    seen: Tensor | None,
    in_document: Tensor | None,
    counts: Tensor | None,
    documents: Tensor | None,
    in_blocks: bool,
) -> Window:
    """Work out what each position sees.

    Args:
        width: W.
        shape: `(B, T)`.
        device: where the indices live.
        seen: positions of each row's stream before this chunk, `[B]`; None when there are none.
        in_document: positions of each row's current document before this chunk, `[B]`; None when there are none.
        counts: real positions of each row in this chunk, `[B]` (they come first); None when all are.
        documents: document index of each position, 0 for the one that continues, `[B, T]`; None when there is one.
        in_blocks: also lay the chunk out in blocks.

    Returns:
        The plan, without reading any tensor back to the host.
    """
    length = shape[1]
    before = None if in_document is None else in_document.unsqueeze(1)
    if documents is None:
        within = torch.arange(length, device=device).unsqueeze(0)
        within = within if before is None else within + before
    else:
        starts = documents != F.pad(documents[:, :-1], (1, 0))
        within = positions_within(starts, before)
    span = (within + 1).clamp(1, width)
    tail_index = None if counts is None else counts.unsqueeze(1) + torch.arange(width - 1, device=device)
    blocks = _lay_out(width, shape, span, seen) if in_blocks else None
    return Window(width, length, span, tail_index, blocks)


def positions_within(starts: Tensor, expected: Tensor | None) -> Tensor:
    """Positions `[B, T]` that count from 0 at every start and continue `expected` `[B, 1]` before the first."""
    index = torch.arange(starts.shape[1], device=starts.device).expand(starts.shape)
    begin = torch.where(starts, index, 0).cummax(1).values
    positions = index - begin
    if expected is not None:
        positions = positions + torch.where(starts.long().cumsum(1) == 0, expected, 0)
    return positions


def _lay_out(width: int, shape: tuple[int, int], span: Tensor, seen: Tensor | None) -> Blocks:
    (batch, length), past = shape, width - 1

    def count_up(size: int) -> Tensor:
        return torch.arange(size, device=span.device)

    back = count_up(BLOCK).unsqueeze(1) + past - count_up(BLOCK + past)  # [BLOCK, J]: 0 is the query itself
    if seen is None:
        count = -(-length // BLOCK)
        of_query = F.pad(span, (0, count * BLOCK - length), value=1)
        index: tuple[Tensor, ...] = ()
    else:
        count = (length + 2 * BLOCK - 2) // BLOCK
        shift = (seen % BLOCK).view(-1, 1)  # where in its block a row's first position stands
        windows = (BLOCK * count_up(count)).unsqueeze(1) + count_up(BLOCK + past)
        query_index = (count_up(count * BLOCK) - shift).clamp(0, length - 1)
        key_index = (windows.flatten() - shift).clamp(0, past + length - 1)
        index = (query_index, shift + count_up(length), key_index)
        of_query = span.expand(batch, -1).gather(1, query_index)
    allowed = (back >= 0) & (back < of_query.view(-1, count, BLOCK, 1))
    allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    return Blocks(count, length, BLOCK + past, allowed, *index)
