"""Needles in real text (after RULER): a fact stated once in a long text, asked for at its end. All of it is plain text.

- `number`: one seven-digit number in real text (niah_single_1 with real text around it).
- `pair`: the number of a named thing in real text, with another named thing's as a distractor.
- `keys`: the whole text consists of such statements about different things; one is asked for (niah_multikey_2).
- `variables`: a value is handed through a chain of variables; all their names are asked for (variable tracking).

Shapes: B sequences, T columns.
"""

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from pmnet.data.tasks.episodes import LONGEST, Episodes, Piece, Span
from pmnet.data.tasks.filler import Filler

KINDS = ("number", "pair", "keys", "variables")
TEXT = Filler("text")
CHAIN = 4  # hops of a chain of variables


@dataclass(frozen=True)
class Needle:
    """A distribution of needle episodes.

    Attributes:
        length: T, bytes of an episode, statements, question and answer included.
        depth: where the needle stands, 0 at the beginning, 1 right before the question; None draws it for each batch
            (`number`, `pair`).
        kind: one of `number`, `pair`, `keys`, `variables`.
        text: the filler around needles.
    """

    length: int = 1024
    depth: float | None = None
    kind: str = "number"
    text: Filler = TEXT

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown needle {self.kind!r}; there are {', '.join(KINDS)}")
        if self.depth is not None and not 0 <= self.depth <= 1:
            raise ValueError(f"the depth of a needle is from 0 to 1, got {self.depth}")
        if self.kind == "keys" and self.length > LONGEST:
            raise ValueError(f"a text of statements (keys) has at most {LONGEST:,} bytes, got {self.length:,}")

    def draw(self, rows: int, generator: torch.Generator) -> Episodes:
        """`rows` episodes."""
        random = np.random.default_rng(int(torch.randint(2**62, (), generator=generator)))
        made = [getattr(self, f"_{self.kind}")(random) for _ in range(rows)]
        needles = [_span([row[0][i] for row in made]) for i in range(len(made[0][0]))]
        question, answer = _span([row[1] for row in made]), _span([row[2] for row in made], scored=True)
        free = self.length - question.length - answer.length - sum(needle.length for needle in needles)
        if free < 0:
            raise ValueError(f"{self.length} bytes are too few for a needle ({self.kind}) and its question")
        if self.depth is None or self.kind in ("keys", "variables"):
            places = np.sort(random.uniform(size=len(needles)))
        else:
            places = np.full(len(needles), self.depth)
        cuts = [0, *(int(place * free) for place in places), free]
        pieces: list[Piece] = []
        for (start, stop), stated in zip(pairwise(cuts), [*needles, question], strict=True):
            pieces += [self.text.draw(rows, stop - start, generator), stated]
        return Episodes((*pieces, answer))

    def _number(self, random: np.random.Generator) -> tuple[list[str], str, str]:
        number = _digits(random, 7)
        return [f" The magic number is {number}. "], "\nWhat is the magic number? It is ", number

    def _pair(self, random: np.random.Generator) -> tuple[list[str], str, str]:
        names, numbers = _words(random, 2), [_digits(random, 7) for _ in range(2)]
        said = [_statement(name, number) for name, number in zip(names, numbers, strict=True)]
        asked = int(random.integers(2))
        return said, _question(names[asked]), numbers[asked]

    def _keys(self, random: np.random.Generator) -> tuple[list[str], str, str]:
        room = self.length - len(_question("abcdef")) - 7
        count = max(1, room // len(_statement("abcdef", "1234567")))
        names, numbers = _words(random, count), [_digits(random, 7) for _ in range(count)]
        said = "".join(_statement(name, number) for name, number in zip(names, numbers, strict=True))
        asked = int(random.integers(count))
        return [said], _question(names[asked]), numbers[asked]

    def _variables(self, random: np.random.Generator) -> tuple[list[str], str, str]:
        names, value = _words(random, CHAIN + 1), _digits(random, 5)
        sources = [value, *(f"VAR {name}" for name in names)]
        said = [f" VAR {name} = {source}. " for name, source in zip(names, sources[:-1], strict=True)]
        return said, f"\nWhich variables are {value}? They are ", " ".join(names)


def _statement(name: str, number: str) -> str:
    return f" The magic number of {name} is {number}. "


def _question(name: str) -> str:
    return f"\nWhat is the magic number of {name}? It is "


def _digits(random: np.random.Generator, count: int) -> str:
    return "".join(map(str, random.integers(0, 10, count)))


def _words(random: np.random.Generator, count: int) -> list[str]:
    """Distinct words of six small letters."""
    numbers = random.choice(26**6, count, replace=False)
    return ["".join(chr(97 + number // 26**place % 26) for place in range(6)) for number in numbers]


def _span(texts: list[str], scored: bool = False) -> Span:
    ids = torch.tensor([list(text.encode()) for text in texts])
    return Span(ids, torch.full_like(ids, scored, dtype=torch.bool))
