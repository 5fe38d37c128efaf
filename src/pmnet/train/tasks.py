"""What the training loop asks of a task, and the task of predicting the bytes of files.

A batch is a function of the task's state and of an index alone, so a resumed run sees the same bytes.
"""

import os
import signal
from collections.abc import Iterator
from itertools import count
from threading import Thread, current_thread, main_thread
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

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
    """Next-byte prediction on windows of files.

    Args:
        windows: of the files.
        workers: processes that read batches ahead; 0 reads where a batch is asked for. The batches are the same.
        processes: that train, and ask for every so manieth batch.
    """

    def __init__(self, windows: RandomWindows | ContiguousWindows, workers: int = 0, processes: int = 1):
        self.windows, self.workers, self.processes = windows, workers, processes
        self.source = windows.files.digest
        self.following = -1
        self.ahead: Iterator[Batch] = iter(())

    def batch(self, index: int) -> Batch:
        """Batch `index` of the windows.

        Raises:
            OSError: if a file cannot be read any more, or a process that reads ahead has ended.
        """
        if self.workers == 0:
            return self.windows.batch(index)
        if index != self.following:
            wanted = count(index, self.processes)
            loader = DataLoader(
                self.windows, batch_size=None, sampler=wanted, num_workers=self.workers, worker_init_fn=_deaf,
                generator=torch.Generator(),  # that of the model, from which a seed would be drawn, stays as it is
            )  # fmt: skip
            self.ahead = _started(loader)
        self.following = index + self.processes
        try:
            return next(self.ahead)
        except (EOFError, ConnectionError, RuntimeError) as error:  # which one depends on what it was doing
            if isinstance(error, RuntimeError) and "DataLoader worker" not in str(error):
                raise
            raise OSError("a process that reads files ahead has ended") from error
        except OSError as error:  # what a worker raised, its whole traceback for a message
            raise OSError(str(error).strip().splitlines()[-1]) from error

    def observe(self, correct: float) -> None:
        """Nothing adapts."""

    def state(self) -> dict[str, Any]:
        """Nothing to remember: batch i is a function of i."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to restore."""


def _started(loader: DataLoader[Batch]) -> Iterator[Batch]:
    """Its workers, whose end is found when a batch is asked for: PyTorch's handler would raise anywhere in a step."""
    if current_thread() is not main_thread() or not hasattr(signal, "SIGCHLD"):  # where PyTorch sets no handler
        return iter(loader)
    before = signal.getsignal(signal.SIGCHLD)
    ahead = iter(loader)
    signal.signal(signal.SIGCHLD, before or signal.SIG_DFL)
    return ahead


def _deaf(_: int) -> None:
    """A worker ends with the process that trains, which may want a last batch when a signal reaches all of them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # macOS cannot tell who sends a signal
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()


def _end_with(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
