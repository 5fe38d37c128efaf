"""The geometry of sliding-window attention in blocks: cost T*W on every device and with every attention kernel.

A stream is cut into blocks of `BLOCK` queries at multiples of `BLOCK` of its own position count, whatever chunk a
position arrives in. A block sees one window of `BLOCK + W - 1` keys. A position therefore always has the same place
in a kernel call of the same shape, which is what makes chunked and token-by-token results equal to the bit.

Shapes: B, T new positions, W window, S blocks, J = BLOCK + W - 1 keys of a block, H heads, E head_dim.
The *buffer* of keys holds the `W - 1` positions before the chunk, then the T new ones.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pmnet.ops import take_rows

BLOCK = 16


@dataclass(frozen=True)
class Window:
    """Where the queries and keys of one chunk go. Index tensors are None when every row starts a fresh stream."""

    width: int  # W
    length: int  # T
    blocks: int  # S
    allowed: Tensor  # [B * S, 1, BLOCK, J] bool
    query_index: Tensor | None  # [B, S * BLOCK] chunk position of every query slot
    slot_index: Tensor | None  # [B, T] query slot of every chunk position
    key_index: Tensor | None  # [B, S * J] buffer place of every key slot
    tail_index: Tensor | None  # [B, W - 1] buffer places the next chunk needs; None: the last ones

    def queries(self, x: Tensor) -> Tensor:
        """`[B, T, H, E]` to `[B * S, H, BLOCK, E]`."""
        if self.query_index is None:
            x = F.pad(x, (0, 0, 0, 0, 0, self.blocks * BLOCK - self.length))
        else:
            x = take_rows(x, self.query_index)
        return x.reshape(x.shape[0] * self.blocks, BLOCK, *x.shape[2:]).transpose(1, 2)

    def keys(self, buffer: Tensor) -> Tensor:
        """`[B, W - 1 + T, H, E]` to `[B * S, H, J, E]`."""
        size = BLOCK + self.width - 1
        if self.key_index is None:
            padded = F.pad(buffer, (0, 0, 0, 0, 0, self.blocks * BLOCK - self.length))
            windows = padded.unfold(1, size, BLOCK).movedim(-1, 3)  # [B, S, H, J, E]
            return windows.flatten(0, 1)
        rows = take_rows(buffer, self.key_index)
        return rows.view(buffer.shape[0] * self.blocks, size, *buffer.shape[2:]).transpose(1, 2)

    def positions(self, y: Tensor) -> Tensor:
        """`[B * S, BLOCK, H, E]` back to `[B, T, H * E]`."""
        y = y.reshape(y.shape[0] // self.blocks, self.blocks * BLOCK, -1)
        return y[:, : self.length] if self.slot_index is None else take_rows(y, self.slot_index)

    def tail(self, buffer: Tensor) -> Tensor:
        """The `W - 1` places of the buffer that the next chunk can still see, `[B, W - 1, H, E]`."""
        return buffer[:, self.length :] if self.tail_index is None else take_rows(buffer, self.tail_index)


def plan_window(
    width: int,
    shape: tuple[int, int],
    device: torch.device,
    seen: Tensor | None,
    in_document: Tensor | None,
    counts: Tensor | None,
    documents: Tensor | None,
) -> Window:
    """Lay a chunk out in blocks.

    Args:
        width: W.
        shape: `(B, T)`.
        device: where the indices live.
        seen: positions of each row's stream before this chunk, `[B]`; None when there are none.
        in_document: positions of each row's current document before this chunk, `[B]`; None when there are none.
        counts: real positions of each row in this chunk, `[B]` (they come first); None when all are.
        documents: document index of each position, 0 for the one that continues, `[B, T]`; None when there is one.

    Returns:
        The layout, without reading any tensor back to the host.
    """
    batch, length = shape
    past = width - 1

    def count_up(size: int) -> Tensor:
        return torch.arange(size, device=device)

    # the document of every place of the buffer; -1 where the current document had not begun
    own = torch.zeros(1, length, dtype=torch.int64, device=device) if documents is None else documents
    known = torch.zeros(1, 1, dtype=torch.int64, device=device) if in_document is None else in_document.unsqueeze(1)
    earlier = torch.where(past - count_up(past).unsqueeze(0) <= known, 0, -1)
    rows = max(own.shape[0], earlier.shape[0])
    of_buffer = torch.cat([earlier.expand(rows, -1), own.expand(rows, -1)], dim=1)

    query_index = slot_index = key_index = None
    if seen is None:
        blocks = -(-length // BLOCK)
        extra = blocks * BLOCK - length
        of_query = F.pad(own, (0, extra)).view(-1, blocks, BLOCK)
        of_key = F.pad(of_buffer, (0, extra)).unfold(1, BLOCK + past, BLOCK)
    else:
        blocks = (length + 2 * BLOCK - 2) // BLOCK
        shift = (seen % BLOCK).view(-1, 1)  # where in its block a row's first position stands
        windows = (BLOCK * count_up(blocks)).unsqueeze(1) + count_up(BLOCK + past)
        query_index = (count_up(blocks * BLOCK) - shift).clamp(0, length - 1)
        slot_index = shift + count_up(length)
        key_index = (windows.flatten() - shift).clamp(0, past + length - 1)
        of_query = take_rows(own.expand(batch, -1), query_index).view(batch, blocks, BLOCK)
        of_key = take_rows(of_buffer.expand(batch, -1), key_index).view(batch, blocks, BLOCK + past)

    distance = count_up(BLOCK + past) - count_up(BLOCK).unsqueeze(1)  # 0 .. W-1 inside the band
    band = (distance >= 0) & (distance <= past)
    same = of_query.unsqueeze(-1) == of_key.unsqueeze(-2)
    allowed = (band & same) | (distance == past)  # a position always sees itself
    allowed = allowed.expand(batch, -1, -1, -1).flatten(0, 1).unsqueeze(1)
    tail_index = None if counts is None else counts.unsqueeze(1) + count_up(past)
    return Window(width, length, blocks, allowed, query_index, slot_index, key_index, tail_index)
