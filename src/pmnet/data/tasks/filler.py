"""Filler: what stands between a question and its answer. Any stretch of it can be made without what precedes it.

Shapes: B sequences, n columns.
"""

import pydoc_data.topics
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

BLOCK = 4096  # columns that are drawn together


@cache
def manual() -> np.ndarray:
    """Real text on every machine: the language reference that comes with the Python interpreter, as bytes."""
    return np.frombuffer("\n".join(pydoc_data.topics.topics.values()).encode(), dtype=np.uint8)


def text_of(path: Path) -> np.ndarray:
    """Bytes of a file as filler, mapped and not loaded.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is empty.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file at {path}")
    if path.stat().st_size == 0:
        raise ValueError(f"{path} is empty")
    return np.memmap(path, dtype=np.uint8, mode="r")


@dataclass(frozen=True)
class Filler:
    """A kind of filler.

    Attributes:
        kind: `"random"`, bytes drawn uniformly; `"constant"`, one byte over and over, another in each row; `"text"`,
            real text from a place of its own in each row, begun again where it ends.
        least: bytes are drawn from `least` to 255 (random and constant).
        text: what `"text"` reads, by default `manual()`.
    """

    kind: str = "random"
    least: int = 0
    text: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"unknown filler {self.kind!r}; there are {', '.join(KINDS)}")

    def draw(self, rows: int, count: int, generator: torch.Generator) -> "Filling":
        """`count` columns of filler for `rows` sequences."""
        seed = int(torch.randint(2**62, (), generator=generator))
        place = torch.rand(rows, 1, generator=generator, dtype=torch.float64)
        return Filling(self, 0, count, seed, place)


KINDS = ("random", "constant", "text")


@dataclass(frozen=True)
class Filling:
    """Columns of filler; a `Piece` of an episode without answers.

    Attributes:
        filler: its kind.
        first: columns that are left out at the beginning.
        length: number of columns.
        seed: of random bytes.
        place: of each row, in `[0, 1)`: which constant, or where in the text. float64 `[B, 1]`.
    """

    filler: Filler
    first: int
    length: int
    seed: int
    place: Tensor

    def after(self, count: int) -> "Filling":
        """The same filler without its first `count` columns."""
        return replace(self, first=self.first + count, length=self.length - count)

    def columns(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Ids and answers (none), `[B, stop - start]`."""
        ids = self._ids(self.first + start, self.first + stop)
        return ids, torch.zeros_like(ids, dtype=torch.bool)

    def _ids(self, start: int, stop: int) -> Tensor:
        least, rows = self.filler.least, self.place.shape[0]
        if self.filler.kind == "constant":
            return (least + self.place * (256 - least)).long().expand(rows, stop - start)
        if self.filler.kind == "text":
            text = manual() if self.filler.text is None else self.filler.text
            first = (self.place * len(text)).long().numpy()
            return torch.from_numpy(text[(first + np.arange(start, stop)) % len(text)].astype(np.int64))
        blocks = [self._block(index, rows) for index in range(start // BLOCK, -(-stop // BLOCK))]
        offset = start // BLOCK * BLOCK
        return torch.cat([torch.empty(rows, 0, dtype=torch.int64), *blocks], dim=1)[:, start - offset : stop - offset]

    def _block(self, index: int, rows: int) -> Tensor:
        random = np.random.default_rng([self.seed, index])
        count = min(BLOCK, self.first + self.length - index * BLOCK)
        return torch.from_numpy(random.integers(self.filler.least, 256, (rows, count), dtype=np.int64))
