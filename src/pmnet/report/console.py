"""What commands print to: paths and strings of users are shown as they are, without markup, emoji or colours."""

import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn, TransferSpeedColumn

out = Console(markup=False, emoji=False, highlight=False)


class Meter:
    """How many bytes a measurement has read, on standard error: bars on a terminal, elsewhere a line every ten seconds.

    Args:
        stays: whether the bars stay on the terminal.
    """

    def __init__(self, stays: bool = True):
        console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        columns = (TextColumn("{task.description}"), BarColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        self.quiet = not console.is_terminal
        self.bars = Progress(*columns, console=console, transient=not stays, disable=self.quiet)
        self.spoken = time.monotonic()

    def __enter__(self) -> "Meter":
        """Show the bars."""
        self.bars.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        """Take them away, or leave them as they are."""
        self.bars.stop()

    def task(self, label: str, total: float | None = None) -> Callable[..., None]:
        """A new bar; what is returned is called with what has been done since, and may be given another `total`."""
        return partial(self._advance, self.bars.add_task(label, total=total))

    def line(self, text: str) -> None:
        """A line of its own, where there are no bars."""
        if self.quiet:
            with suppress(OSError):  # nobody listens any more
                print(text, file=sys.stderr, flush=True)

    def _advance(self, bar: TaskID, count: float, total: float | None = None) -> None:
        self.bars.update(bar, advance=count, total=total)
        if time.monotonic() - self.spoken > 10:
            self.spoken, task = time.monotonic(), self.bars.tasks[bar]
            whole = "" if task.total is None else f" of {task.total:,.0f}"
            left = "" if task.time_remaining is None else f"  left {task.time_remaining:.0f} s"
            rate = f"  {task.speed or 0:,.0f} bytes/s"
            self.line(f"{task.description}: {task.completed:,.0f}{whole} bytes{rate}{left}")
