"""What a training run will cost, said before it starts."""

import time

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from pmnet.baselines import Carry, carries, matrix_scan
from pmnet.config import PMNetConfig
from pmnet.report.flops import TRAINING_FACTOR, flops
from pmnet.train.recipes import Recipe

_ROWS, _LENGTH = 2, 256  # of the trial on a CPU


def cost_line(recipe: Recipe, processes: int = 1, done: int = 0) -> str:
    """Bytes, FLOP (of a PMNet) and hours of a run on files, at the rate of a forward and backward pass measured now.

    Practice in between is not counted, nor are the steps that a resumed run has `done`.
    """
    practice = 0 if recipe.practice is None else -(-recipe.steps // recipe.practice) - -(-done // recipe.practice)
    total = (recipe.steps - done - practice) * recipe.batch_size * recipe.length * processes
    rate = measured_rate(recipe) * processes
    work = ""
    if isinstance(recipe.model, PMNetConfig):
        work = f"{total * TRAINING_FACTOR * flops(recipe.model, recipe.length):.3g} FLOP, "
    hours = total / rate / 3600
    takes = f"{hours:,.2f} hours" if hours >= 0.1 else f"{3600 * hours:,.0f} seconds"
    beside = f", beside {practice:,} batches of practice" if practice else ""
    return f"{total:,} bytes to read, {work}about {takes} at the {rate:,.0f} bytes/s measured here{beside}"


def measured_rate(recipe: Recipe) -> float:
    """Bytes per second of one process: the faster of two passes, without the optimizer, in a small batch on a CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    rows, length = (recipe.batch_size, recipe.length) if device == "cuda" else (_ROWS, min(_LENGTH, recipe.length))
    model = AutoModelForCausalLM.from_config(recipe.model).to(device).train()
    carry = Carry(model, rows) if recipe.carry and carries(recipe.model) else None
    ids, best = torch.zeros(rows, length, dtype=torch.int64, device=device), float("inf")
    for _ in range(2):
        started = time.perf_counter()
        with matrix_scan(model), torch.autocast(device, dtype=torch.bfloat16, enabled=recipe.precision == "bf16"):
            logits = carry.read(ids) if carry is not None else model(ids, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1).float(), ids.flatten())
        loss.backward()
        loss.item()  # waits for the device
        best = min(best, time.perf_counter() - started)
    return rows * length / best
