"""What the training loop asks of a task, and the task of predicting the bytes of files.

A batch is a function of the task's state and of an index alone, so a resumed run sees the same bytes.
"""

from typing import Any, Protocol

from torch import Tensor

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
