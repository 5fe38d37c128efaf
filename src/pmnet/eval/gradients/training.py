"""Gradient norms of the first steps of copy-paste, without clipping: does training stay finite, and how even is it."""

import math
from dataclasses import dataclass
from statistics import mean, median
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from pmnet.data.tasks import CopyPaste, training_batch
from pmnet.memory import MemoryWrite
from pmnet.train.loop import loss_of

LETTERS = 8
MARKERS = 4  # COPY, EOS, PASTE, EOS
SHORTEST = 2 * LETTERS + MARKERS


@dataclass(frozen=True)
class Trial:
    """One short training.

    Attributes:
        total: T, positions of an episode: eight letters twice, four markers, filler.
        rate: learning rate of AdamW, constant, without warm-up or weight decay.
        scale: of every matrix, embedding and anchor at initialisation, relative to the model's own.
        factor: whether gradients of rotations are divided by the root of their number (memory trees).
        seed: of initialisation and data.
        steps, rows: optimizer steps, and episodes of each.
    """

    total: int
    rate: float
    scale: float = 1.0
    factor: bool = True
    seed: int = 0
    steps: int = 50
    rows: int = 4


def run(config: PreTrainedConfig, trial: Trial) -> tuple[list[float], list[float]]:
    """Losses and gradient norms of every step; the first that is not finite is the last one.

    Raises:
        ValueError: if T has no room for letters and markers, or is too much to be read at once.
    """
    gap = trial.total - SHORTEST
    problem = CopyPaste((LETTERS, LETTERS), (gap, gap))
    torch.manual_seed(trial.seed)
    model = AutoModelForCausalLM.from_config(config).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(trial.scale)
    for module in model.modules():
        if isinstance(module, MemoryWrite) and not trial.factor:
            module.eval()  # training is when the factor is applied; nothing else in a write depends on it
    optimizer = torch.optim.AdamW(model.parameters(), lr=trial.rate, betas=(0.9, 0.95), weight_decay=0.0)
    losses, norms = list[float](), list[float]()
    for step in range(trial.steps):
        generator = torch.Generator().manual_seed(1_000_003 * trial.seed + step)  # it has 32 bits
        loss, _ = loss_of(model, training_batch(problem.draw(trial.rows, generator)))
        optimizer.zero_grad()
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        losses.append(loss.item())
        norms.append(float(torch.nn.utils.get_total_norm(grads)))
        if not (math.isfinite(losses[-1]) and math.isfinite(norms[-1])):
            break
        optimizer.step()
    return losses, norms


def summary(runs: list[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """What is told of several seeds: gradient norms over all their steps, and how many diverged.

    A run has diverged when a loss or norm is not finite, or its last tenth is on average worse than its first loss by
    more than one nat.
    """
    norms = sorted(norm for _, values in runs for norm in values if math.isfinite(norm))
    ends = [mean(losses[-max(1, len(losses) // 10) :]) for losses, _ in runs]
    diverged = [
        not all(map(math.isfinite, [end, *values])) or end > losses[0] + 1
        for (losses, values), end in zip(runs, ends, strict=True)
    ]
    finite = [end for end in ends if math.isfinite(end)]
    return {
        "runs": len(runs),
        "median": median(norms) if norms else None,
        "p99": norms[min(len(norms) - 1, int(0.99 * len(norms)))] if norms else None,
        "max": norms[-1] if norms else None,
        "diverged": sum(diverged),
        "first_loss": median(losses[0] for losses, _ in runs),
        "last_loss": median(finite) if finite else None,
    }
