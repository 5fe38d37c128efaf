"""What the training loop asks of a task, and the two tasks: bytes of files, copy-paste.

A batch is a function of the task's state and of an index alone, so a resumed run sees the same bytes.
"""

from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pmnet.data.copy_paste import copy_batch
from pmnet.data.files import RandomWindows

Batch = dict[str, Tensor]


class Task(Protocol):
    """A source of batches with a small, JSON-able state."""

    def batch(self, index: int) -> Batch:
        """`input_ids` `[B, T]`, optionally `attention_mask`, and `labels` `[B, S]` for the last S positions.

        labels are already shifted: `labels[:, s]` is what position `T - S + s` must predict; -100 is ignored.
        """
        ...

    def observe(self, correct: float) -> None:
        """Learn the share of labels of the last batch that were predicted, to adapt the next ones."""
        ...

    def state(self) -> dict[str, Any]:
        """Everything that `restore` needs, and what the progress line shows."""
        ...

    def restore(self, state: dict[str, Any]) -> None:
        """Continue from `state`."""
        ...


class ByteTask:
    """Next-byte prediction on windows of files."""

    def __init__(self, windows: RandomWindows):
        self.windows = windows

    def batch(self, index: int) -> Batch:
        """Batch `index` of the windows."""
        return self.windows.batch(index)

    def observe(self, correct: float) -> None:
        """Nothing adapts."""

    def state(self) -> dict[str, Any]:
        """Nothing to remember: batch i is a function of i."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


@dataclass
class CopyCurriculum:
    """Copy-paste with strings that grow: k rises by one whenever the current length is mostly right.

    While strings grow, gaps are always beyond the attention's reach: a target within reach is relayed through
    attention, and the memory is never learned. They start narrow and, once strings have their full length, widen to
    `gap`. One batch in eight then has gaps from 0 up, and one in four has long gaps in rows four times as wide (and a
    quarter as many): without these, some seeds learn to hold a string only about as long as they were trained to.

    Attributes:
        reach: receptive field of the attention stack, in positions.
        seed: of the draw.
        batch_size: B.
        longest: final k.
        narrow, gap: greatest gap beyond `reach`, while strings grow and after.
        advance: share of right letters, smoothed over about ten batches, at which k rises.
        length, smoothed: the state.
    """

    reach: int
    seed: int
    batch_size: int = 32
    longest: int = 8
    narrow: int = 4
    gap: int = 6
    advance: float = 0.75
    length: int = 1
    smoothed: float = 0.0
    drawn: int = 0

    @property
    def width(self) -> int:
        """T of a batch; constant but for the long gaps, so that compiled code fits all of training."""
        return 2 * self.longest + 2 + self.reach + self.gap + 1

    def batch(self, index: int) -> Batch:
        """Sequences of the current length, or three times in ten of a shorter one."""
        generator = torch.Generator().manual_seed(self.seed * 2**32 + index)
        review = torch.rand((), generator=generator).item() < 0.3
        shorter = int(torch.randint(1, self.length + 1, (), generator=generator))
        self.drawn = shorter if review else self.length
        kind = torch.rand((), generator=generator).item() if self.length == self.longest else 1.0
        rows, width, gaps = self.batch_size, self.width, (self.reach, self.reach + self.narrow)
        if kind < 1 / 8:
            gaps = (0, self.reach)
        elif kind < 3 / 8:
            rows, width = max(1, rows // 4), 4 * width
            gaps = (self.reach, width - 2 * self.longest - 3)
        elif kind < 1:
            gaps = (self.reach, self.reach + self.gap)
        drawn = copy_batch(rows, self.drawn, gaps, 1, generator, width)
        labels = torch.full((rows, self.longest), -100)
        labels[:, self.longest - self.drawn :] = drawn.strings
        return {
            "input_ids": drawn.input_ids[:, :-1],
            "attention_mask": drawn.attention_mask[:, :-1],
            "labels": labels,
        }

    def observe(self, correct: float) -> None:
        """Raise k when the current length is mostly right."""
        if self.drawn == self.length:
            self.smoothed = 0.9 * self.smoothed + 0.1 * correct
        if self.smoothed > self.advance and self.length < self.longest:
            self.length, self.smoothed = self.length + 1, 0.3

    def state(self) -> dict[str, Any]:
        """The current length and its smoothed accuracy."""
        return {name: value for name, value in asdict(self).items() if name in ("length", "smoothed", "drawn")}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue with that length and accuracy."""
        self.length, self.smoothed, self.drawn = state["length"], state["smoothed"], state["drawn"]
