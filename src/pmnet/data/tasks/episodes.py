"""Episodes: sequences with answers to score, made piece by piece, so that a distance costs time and never memory.

Shapes: B sequences of a draw, T columns of an episode, c columns of a chunk.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

LONGEST = 2**20  # columns of an episode that are made at once; it may have more where it is read piece by piece


class Piece(Protocol):
    """Some columns of all sequences, of a length known beforehand."""

    @property
    def length(self) -> int:
        """Number of columns."""
        ...

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Ids, int64 `[B, stop - start]`, and whether each is an answer, bool of the same shape."""
        ...


@dataclass(frozen=True)
class Span:
    """Columns that are known at once.

    Attributes:
        ids: int64 `[B, n]`.
        scored: bool `[B, n]`, True where the id is part of an answer; None for nowhere.
    """

    ids: Tensor
    scored: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of columns."""
        return self.ids.shape[1]

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Ids and answers, `[B, stop - start]`."""
        ids = self.ids[:, start:stop]
        scored = torch.zeros_like(ids, dtype=torch.bool) if self.scored is None else self.scored[:, start:stop]
        return ids, scored


def check_length(columns: int) -> None:
    """ValueError if an episode has more than `LONGEST` columns, too many to be made at once."""
    if columns > LONGEST:
        raise ValueError(f"an episode of {columns:,} bytes cannot be read at once; {LONGEST:,} is the most")


@dataclass(frozen=True)
class Episodes:
    """B episodes of one task.

    Attributes:
        pieces: the columns, in order.
    """

    pieces: tuple[Piece, ...]

    @property
    def rows(self) -> int:
        """B."""
        return self.pieces[0].columns(0, 0)[0].shape[0]

    @property
    def length(self) -> int:
        """T."""
        return sum(piece.length for piece in self.pieces)

    def chunks(self, size: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The episodes in chunks of at most `size` columns: ids and answers, `[B, c]` each."""
        for piece in self.pieces:
            for start in range(0, piece.length, size):
                yield piece.columns(start, min(start + size, piece.length))

    def dense(self) -> tuple[Tensor, Tensor]:
        """All columns at once: ids, int64 `[B, T]`, and answers, bool `[B, T]`.

        Raises:
            ValueError: if there are more than `LONGEST`.
        """
        check_length(self.length)
        ids, scored = zip(*self.chunks(max(1, self.length)), strict=True)
        return torch.cat(ids, dim=1), torch.cat(scored, dim=1)


class Problem(Protocol):
    """A distribution of episodes: a task with all its settings."""

    def draw(self, rows: int, generator: torch.Generator) -> Episodes:
        """`rows` episodes of equal length, a function of the generator's state alone."""
        ...


def training_batch(episodes: Episodes) -> dict[str, Tensor]:
    """What the training loop takes: `input_ids` `[B, T - 1]` and `labels` `[B, S]` for the last S of these positions.

    S is the least that holds every answer; -100 marks what is not one.
    """
    ids, scored = episodes.dense()
    first = int(scored.any(0).nonzero()[0])
    labels = torch.where(scored, ids, -100)
    return {"input_ids": ids[:, :-1], "labels": labels[:, max(1, first) :]}
