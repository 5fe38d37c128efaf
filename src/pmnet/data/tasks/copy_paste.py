"""Copy-paste (arXiv 2605.13370): remember a string of bytes, read filler, write the string again.

One episode is `filler, COPY, k letters, EOS, gap of filler, PASTE, the k letters, EOS`, or several of these one after
another in the same state; the answer is the k letters and EOS. Letters and filler may be any of the 256 byte values, so
nothing but its place tells a letter from filler. Whenever the gap is at least the receptive field, the answer has to
come from memory: the last letter is then out of reach.

Shapes: B sequences, k letters.
"""

from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor

from pmnet.data.tasks.episodes import LONGEST, Episodes, Piece, Span
from pmnet.data.tasks.filler import Filler
from pmnet.model.tokenizer import COPY, EOS, PASTE


@dataclass(frozen=True)
class CopyPaste:
    """A distribution of copy-paste episodes.

    Attributes:
        length: least and greatest k; one is drawn for all rows of a batch.
        gap: least and greatest number of filler bytes between EOS and PASTE, drawn row by row; what a row has less
            than the greatest stands before COPY.
        fillers: kinds of filler; one is drawn for all rows of a batch.
        letters: letters are byte values below this number, drawn uniformly.
        rounds: strings of an episode, each of which is read, held and asked for before the next begins.
        last: only the answer of the last of them is scored.
    """

    length: tuple[int, int]
    gap: tuple[int, int]
    fillers: tuple[Filler, ...] = (Filler(),)
    letters: int = 256
    rounds: int = 1
    last: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.length[0] <= self.length[1]:
            raise ValueError(f"copy-paste needs lengths from 1 up, got {self.length}")
        if not 0 <= self.gap[0] <= self.gap[1]:
            raise ValueError(f"copy-paste needs gaps from 0 up, got {self.gap}")
        if self.rounds < 1:
            raise ValueError(f"copy-paste needs at least one string, got {self.rounds}")
        if self.rounds * self.length[1] > LONGEST:
            letters = f"{self.rounds * self.length[1]:,}"
            raise ValueError(f"the strings of an episode have at most {LONGEST:,} letters together, got {letters}")

    def draw(self, rows: int, generator: torch.Generator) -> Episodes:
        """`rows` episodes."""
        length = int(_uniform(self.length[0], self.length[1] + 1, (), generator))
        filler = self.fillers[int(_uniform(0, len(self.fillers), (), generator))]
        pieces = [self._round(rows, length, filler, generator) for _ in range(self.rounds)]
        if self.last:
            pieces[:-1] = [(*read, Span(answer.columns(0, answer.length)[0])) for *read, answer in pieces[:-1]]
        return Episodes(tuple(chain.from_iterable(pieces)))

    def _round(self, rows: int, length: int, filler: Filler, generator: torch.Generator) -> tuple[Piece, ...]:
        strings = _uniform(0, self.letters, (rows, length), generator)
        more = _uniform(0, self.gap[1] - self.gap[0] + 1, (rows,), generator)
        spare = self.gap[1] - self.gap[0]
        filling = filler.draw(rows, self.gap[1], generator)
        around, _ = filling.columns(0, spare)
        return Span(_inserted(strings, around, more)), filling.after(spare), asked(strings)


def filler_columns(ids: Tensor) -> Tensor:
    """Which columns of episodes `[B, T]` are filler, bool of the same shape: neither marker nor letter nor EOS."""
    begun = ((ids == COPY) | (ids == PASTE)).cumsum(1)
    return (begun == (ids == EOS).cumsum(1)) & (ids != EOS)


def marked(strings: Tensor) -> Tensor:
    """`COPY, letters, EOS`: strings `[B, k]`, result `[B, k + 2]`."""
    return torch.nn.functional.pad(_ended(strings), (1, 0), value=COPY)


def asked(strings: Tensor) -> Piece:
    """`PASTE, letters, EOS`, of which all but PASTE is the answer; strings `[B, k]`."""
    ids = torch.nn.functional.pad(_ended(strings), (1, 0), value=PASTE)
    return Span(ids, ids != PASTE)


def _ended(strings: Tensor) -> Tensor:
    return torch.nn.functional.pad(strings, (0, 1), value=EOS)


def _inserted(strings: Tensor, around: Tensor, after: Tensor) -> Tensor:
    """The marked string of each row amid the filler `around` `[B, n]`, the last `after` `[B]` columns of it behind."""
    places = (around.shape[1] - after).tolist()
    parts = zip(around, marked(strings), places, strict=True)
    return torch.stack([torch.cat([filler[:place], string, filler[place:]]) for filler, string, place in parts])


def _uniform(low: int, high: int, shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    return torch.randint(low, high, shape, generator=generator)
