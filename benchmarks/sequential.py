"""What a training step costs a PMNet and its recurrent controls: `python -m benchmarks.sequential FILE`.

Processor time and peak memory of forward, backward and AdamW by sequence length, every model of the demo's size, in a
process of its own, with as many rows as make `POSITIONS` positions. Processor time, not that of the clock: with one
thread it is the same, and it does not depend on what else runs.
"""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from benchmarks.memory import resident_bytes
from pmnet.baselines import control
from pmnet.report.provenance import provenance, write_json
from pmnet.train.loop import loss_of
from pmnet.train.recipes import demo_model

NAMES = ("pmnet", "lstm", "ntm")
LENGTHS = (32, 256, 2048)
POSITIONS = 2048
STEPS = 3


def cost(name: str, length: int) -> dict[str, Any]:
    """Measure one model in this process.

    Returns:
        Processor seconds of `STEPS` training steps after a first one that is not counted, bytes per second at their
        median, and how much more memory was resident at the peak than before the first step.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(control(name, demo_model())).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = torch.randint(0, 256, (POSITIONS // length, length + 1))
    batch, seconds = {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}, list[float]()
    before = resident_bytes()
    for _ in range(STEPS + 1):
        started = time.process_time()
        loss_of(model, batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.process_time() - started)
    return {
        "name": name, "length": length, "rows": len(ids), "parameters": model.num_parameters(),
        "seconds": seconds[1:], "bytes_per_second": POSITIONS / median(seconds[1:]),
        "peak_bytes": resident_bytes(peak=True) - before,
    }  # fmt: skip


def main(save: Path) -> None:
    """Measure all, one after the other, and store them."""
    rows = []
    for name in NAMES:
        for length in LENGTHS:
            command = [sys.executable, "-m", "benchmarks.sequential", name, str(length)]
            done = subprocess.run(command, env=os.environ, capture_output=True, text=True, check=True)
            rows.append(json.loads(done.stdout))
            print(f"{name} {length}: {rows[-1]['bytes_per_second']:,.0f} bytes/s, {rows[-1]['peak_bytes']:,} bytes")
            write_json(save, provenance() | {"positions": POSITIONS, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    if len(sys.argv) == 2:
        main(Path(sys.argv[1]))
    else:
        print(json.dumps(cost(sys.argv[1], int(sys.argv[2]))))
