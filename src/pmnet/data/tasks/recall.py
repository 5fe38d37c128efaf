"""Multi-query associative recall (after Zoology): pairs of a key and a value, then every key again, asking its value.

One episode is `key value key value ...`, all of them distinct, then a stretch of blanks in which every key stands once,
followed by its value, which is the answer. Where the questions stand follows a power law: most come early, a few late.
Keys and values are symbols of one or two bytes each, from 1 to 255; keys are from the lower half of all symbols, values
from the upper one, so that a symbol tells what it is (unless they are `mixed`). The blank is byte 0.

Shapes: B sequences, P pairs, w bytes of a symbol.
"""

from dataclasses import dataclass

import numpy as np
import torch

from pmnet.data.tasks.episodes import Episodes, Span

BLANK = 0


@dataclass(frozen=True)
class Recall:
    """A distribution of recall episodes. Zoology trains on `(length, pairs)` from (64, 4) to (256, 64).

    Attributes:
        length: symbols of an episode, pairs and questions together; columns are `width` times as many.
        pairs: P.
        width: w, bytes of a key and of a value, 1 or 2.
        power: a; a question stands in slot x with probability proportional to `a * x**(a - 1)`.
        symbols: how many there are of keys, and as many of values; None: `most`.
        mixed: keys and values are of the same symbols, and a value may come twice: what a symbol is can only be told by
            those before. (Not Zoology's.)
    """

    length: int = 64
    pairs: int = 4
    width: int = 1
    power: float = 0.01
    symbols: int | None = None
    mixed: bool = False

    def __post_init__(self) -> None:
        known = self.width in (1, 2) and 1 <= self.pairs <= self.alphabet <= self.most
        if not known or 4 * self.pairs > self.length:
            raise ValueError(f"no room for recall in {self}")

    @property
    def most(self) -> int:
        """Symbols that a key can be: half of all, 127 of one byte and 32,512 of two; all of them if `mixed`."""
        return 255**self.width // (1 if self.mixed else 2)

    @property
    def alphabet(self) -> int:
        """How many keys there are, and how many values."""
        return self.most if self.symbols is None else self.symbols

    def draw(self, rows: int, generator: torch.Generator) -> Episodes:
        """`rows` episodes."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        slots = self.length // 2 - self.pairs
        chance = np.arange(1, slots + 1) ** (self.power - 1.0)
        # the places with the P largest keys are a draw without replacement (exponential races)
        places = np.argsort(random.exponential(size=(rows, slots)) / chance, axis=1)[:, : self.pairs]
        keys, values = (
            np.stack([random.choice(self.alphabet, self.pairs, replace=twice) for _ in range(rows)])
            for twice in (False, self.mixed)
        )
        values += 0 if self.mixed else self.most
        known = np.concatenate([self._bytes(keys), self._bytes(values)], axis=2)
        questions = np.full((rows, slots, 2 * self.width), BLANK)
        np.put_along_axis(questions, places[:, :, None], known, axis=1)
        scored = questions != BLANK
        scored[:, :, : self.width] = False
        return Episodes(
            (
                Span(torch.from_numpy(known.reshape(rows, -1))),
                Span(torch.from_numpy(questions.reshape(rows, -1)), torch.from_numpy(scored.reshape(rows, -1))),
            )
        )

    def _bytes(self, symbols: np.ndarray) -> np.ndarray:
        """Symbols `[B, P]` as bytes `[B, P, w]` from 1 to 255, the more significant one first."""
        return np.stack([symbols // 255**place % 255 + 1 for place in reversed(range(self.width))], axis=2)
