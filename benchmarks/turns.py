"""Several measurements on one GPU: they prepare (compile) at the same time and measure one after the other."""

import fcntl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PATIENCE = 150.0  # seconds that a measurement waits for others that are still preparing


@contextmanager
def turn(folder: Path, name: str, names: list[str]) -> Iterator[None]:
    """Alone on the GPU: entered when all of `names` are ready (or after `PATIENCE` seconds), by one at a time."""
    start = time.monotonic()
    (folder / name).touch()
    while time.monotonic() - start < PATIENCE and not all((folder / other).exists() for other in names):
        time.sleep(0.1)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def run_all(commands: dict[str, list[str]], folder: Path) -> dict[str, int]:
    """Run one command per measurement at the same time; those that end count as ready. Returns exit codes."""
    began, codes = time.monotonic(), {}
    running = {name: subprocess.Popen([sys.executable, *command]) for name, command in commands.items()}
    while running:
        for name, process in list(running.items()):
            if process.poll() is not None:
                codes[name] = running.pop(name).returncode
                (folder / name).touch()
                print(f"{time.monotonic() - began:5.0f} s  {name} ended with {codes[name]}", flush=True)
        time.sleep(0.1)
    return codes
