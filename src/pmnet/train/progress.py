"""What a person and a file see of a run: one live line, metrics as JSON lines and TensorBoard events."""

import json
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

from pmnet.atomic import replacing

SHOWN = ("loss", "correct", "stage")


class Reporter:
    """Live progress on a terminal (a line every ten seconds elsewhere), `metrics.jsonl` and `tensorboard/`.

    Seconds of this attempt and resident memory in bytes are added to every row.

    Args:
        run: run folder.
        total: steps.
        done: steps already done; later lines of an earlier attempt are dropped.
        enabled: False on all processes but the main one: nothing is shown or written.
    """

    def __init__(self, run: Path, total: int, done: int, enabled: bool = True):
        self.enabled = enabled
        if not enabled:
            return
        self.console, self.process = Console(stderr=True), psutil.Process()
        self.path = run / "metrics.jsonl"
        kept = _lines(self.path, done)
        with replacing(self.path) as partial:
            partial.write_text("".join(line + "\n" for line in kept))
        self.file = self.path.open("a")
        self.board = SummaryWriter(str(run / "tensorboard"), purge_step=done + 1)
        self.total, self.started, self.first, self.spoken = total, time.monotonic(), done, time.monotonic()
        self.progress = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn(), console=self.console,
            disable=not self.console.is_terminal,
        )  # fmt: skip
        self.bar = self.progress.add_task("training", total=total, completed=done, text="compiling")
        self.progress.start()

    def step(self, row: dict[str, Any], every: int = 10) -> None:
        """Record one step's numbers; files get the first, every `every`-th and the last."""
        if not self.enabled:
            return
        step = row["step"]
        elapsed = time.monotonic() - self.started
        rate = (step - self.first) / elapsed
        row = row | {"seconds": round(elapsed, 2), "resident": self.process.memory_info().rss}
        text = "  ".join(f"{name} {_short(row[name])}" for name in SHOWN if name in row)
        self.progress.update(self.bar, completed=step, text=f"{text}  {rate:.1f} steps/s")
        if not self.console.is_terminal and (time.monotonic() - self.spoken > 10 or step == self.total):
            self.spoken = time.monotonic()
            left = (self.total - step) / rate
            line = f"step {step}/{self.total}  {text}  {rate:.1f} steps/s  left {left:.0f} s"
            with suppress(OSError):  # nobody listens any more
                print(line, file=sys.stderr, flush=True)
        if step % every == 0 or step in (self.first + 1, self.total):
            try:
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
            except OSError as error:
                raise OSError(f"cannot write {self.path}: {error}") from error
            with suppress(OSError):  # metrics.jsonl has the same
                for name, value in row.items():
                    if isinstance(value, int | float) and name != "step":
                        self.board.add_scalar(f"train/{name}", value, step)

    def close(self) -> None:
        """Flush and close everything."""
        if not self.enabled:
            return
        self.progress.stop()
        with suppress(OSError):  # a disk that is full has been reported, or nothing was lost
            self.file.close()
        with suppress(OSError):
            self.board.close()


def _lines(path: Path, done: int) -> list[str]:
    """Lines of `metrics.jsonl` up to step `done`; what was cut off in the middle is left out.

    Raises:
        ValueError: if a line is not one of ours.
    """
    kept = []
    lines = path.read_text(errors="replace").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            if line.endswith("}") and json.loads(line)["step"] <= done:
                kept.append(line)
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"line {number} of {path} is not a step of a training run") from error
    return kept


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
