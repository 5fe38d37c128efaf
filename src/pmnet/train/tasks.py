"""What the training loop asks of a task, and the task of predicting the bytes of files.

A batch is a function of the task's state and of an index alone, so a resumed run sees the same bytes.
"""

from typing import Any, Protocol

from torch import Tensor

from pmnet.data.files import RandomWindows
from pmnet.data.streams import ContiguousWindows

Batch = dict[str, Tensor]


class Task(Protocol):
    """A source of batches with a small, JSON-able state.

    Attributes:
        source: names what the batches are drawn from, where that is not the recipe alone.
    """

    source: str

    def batch(self, index: int) -> Batch:
        """`input_ids` `[B, T]`, and `labels` `[B, S]` for the last S positions; optionally `attention_mask`, `restart`.

        labels are already shifted: `labels[:, s]` is what position `T - S + s` must predict; -100 is ignored.
        restart, bool `[B]`: the row starts from an empty state (where the state is carried from batch to batch).
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

    def __init__(self, windows: RandomWindows | ContiguousWindows):
        self.windows = windows
        self.source = windows.files.digest

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
