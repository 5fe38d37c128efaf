"""Peak resident memory of training: `python -m benchmarks.memory CONTENDER PRESET BATCH LENGTH` prints one as JSON.

Every contender gets a fresh process, because a peak cannot be taken back. The figures are read from the kernel's
account of the process itself; `getrusage` would do, were its peak not inherited from the process that started it.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.contenders import build
from pmnet.train.recipes import MODELS

STATUS = Path("/proc/self/status")
STEPS = 3
SHORTER = {"mamba": 8}  # its loop keeps every step's state for the backward: measured at T / 8


def resident_bytes(peak: bool = False) -> int:
    """Memory of this process that is in RAM, now or at its peak.

    Raises:
        OSError: where the system does not tell (it needs `/proc`).
    """
    key = "VmHWM:" if peak else "VmRSS:"
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])


def measure_memory(names: list[str], preset: str, batch: int, length: int, seconds: float) -> dict[str, Any]:
    """Peak memory of each contender in its own process.

    Args:
        names: contenders.
        preset: key of `pmnet.train.recipes.MODELS`.
        batch, length: B and T of a training step; `SHORTER` divides T.
        seconds: limit for each process.

    Returns:
        A row per contender with bytes after importing and building the model (`resident_bytes`), at the peak of three
        steps (`peak_bytes`), and their difference; those left out with the reason.
    """
    rows: list[dict[str, Any]] = []
    left_out = []
    for name in names:
        size = str(max(1, length // SHORTER.get(name, 1)))
        command = [sys.executable, "-m", "benchmarks.memory", name, preset, str(batch), size]
        try:
            done = subprocess.run(
                command, cwd=Path(__file__).parents[1], env=os.environ, capture_output=True, text=True, timeout=seconds
            )
        except subprocess.TimeoutExpired:
            left_out.append({"contender": name, "reason": f"not done after {seconds:g} s"})
            continue
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            left_out.append({"contender": name, "reason": f"exit code {done.returncode}: {last}"})
        else:
            rows.append({"contender": name, **json.loads(done.stdout)})
    return {"kind": "memory", "steps": STEPS, "rows": rows, "left_out": left_out}


def train_steps(name: str, preset: str, batch: int, length: int) -> dict[str, Any]:
    """Train a contender for `STEPS` steps in this process; bytes before, at the peak, and between."""
    model = build(MODELS[preset](), [name])[0]
    model.module.train()
    before = resident_bytes()
    optimizer = torch.optim.AdamW(model.module.parameters(), fused=True)
    ids = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(0))
    for _ in range(STEPS):
        model.loss(ids).backward()
        optimizer.step()
        optimizer.zero_grad()
    peak = resident_bytes(peak=True)
    sizes = {"resident_bytes": before, "peak_bytes": peak, "difference_bytes": peak - before}
    return {"parameters": model.parameters, "batch": batch, "length": length, **sizes}


if __name__ == "__main__":
    contender, size_name, sequences, positions = sys.argv[1:]
    print(json.dumps(train_steps(contender, size_name, int(sequences), int(positions))))
