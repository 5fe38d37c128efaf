"""Selective copying (after MAD): letters are strewn among blanks and have to be written, in order, afterwards.

One episode is a context of `L - k - 1` columns, in which k letters stand at random places and a blank everywhere else,
then PASTE and the k letters in order, which are the answer. A vocabulary of V holds V - 2 letters, the blank and PASTE.

Shapes: B sequences, k letters, L columns of an episode.
"""

from dataclasses import dataclass

import torch

from pmnet.data.tasks.episodes import LONGEST, Episodes, Span
from pmnet.model.tokenizer import PASTE

BLANK = 0


@dataclass(frozen=True)
class SelectiveCopy:
    """A distribution of selective-copying episodes. MAD's settings are `(16, 256)` and, harder, `(32, 512)`.

    Attributes:
        letters: k.
        length: L.
        vocabulary: V; letters are the byte values 1 to V - 2.
    """

    letters: int = 16
    length: int = 256
    vocabulary: int = 16

    def __post_init__(self) -> None:
        if self.letters < 1 or self.length < 2 * self.letters + 1 or not 3 <= self.vocabulary <= 257:
            raise ValueError(f"no room for selective copying in {self}")
        if self.length > LONGEST:
            raise ValueError(f"selective copying has at most {LONGEST:,} columns, got {self.length:,}")

    def draw(self, rows: int, generator: torch.Generator) -> Episodes:
        """`rows` episodes."""
        context = self.length - self.letters - 1
        strings = torch.randint(1, self.vocabulary - 1, (rows, self.letters), generator=generator)
        places = torch.rand(rows, context, generator=generator).argsort(1)[:, : self.letters].sort(1).values
        ids = torch.full((rows, context), BLANK).scatter(1, places, strings)
        asked = torch.nn.functional.pad(strings, (1, 0), value=PASTE)
        return Episodes((Span(ids), Span(asked, asked != PASTE)))
