"""What few bits do to states and to training.

Shapes: B sequences, T positions, C phases.
"""

import math
from collections.abc import Callable
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from pmnet.data.tasks import Filler
from pmnet.ops import circular_difference, phase_scan, to_radians, to_turns
from pmnet.train.loop import loss_of
from pmnet.train.optimizers import build_optimizers
from pmnet.train.recipes import Recipe

Scan = Callable[[Tensor], Tensor]  # rotations in radians, float32 [B, T, C], to states after each (or the last TAIL)
TAIL = 100  # positions at the end whose error counts


def exact(rotation: Tensor) -> Tensor:
    """States of the phase memory: rotations rounded to `2**-32` turn, then summed as integers."""
    batch, length, size = rotation.shape
    groups, empty = torch.zeros(batch, length, dtype=torch.int64), torch.zeros(batch, 1, size, dtype=torch.int32)
    return to_radians(phase_scan(to_turns(rotation), groups, empty)[0], torch.float64)


def cumulative(rotation: Tensor) -> Tensor:
    """Each row by itself: a cumulative sum in float32, modulo one turn."""
    return rotation.cumsum(1) % (2 * math.pi)


def half(rotation: Tensor) -> Tensor:
    """The running state in bfloat16, added to one position after the other and wrapped."""
    state, states = torch.zeros_like(rotation[:, 0], dtype=torch.bfloat16), []
    for column in rotation.bfloat16().unbind(1):
        state = (state + column) % (2 * math.pi)
        states.append(state)
    return torch.stack(states[-TAIL:], dim=1).float()


def state_errors(
    forms: dict[str, tuple[Scan, int]], lengths: list[int], rows: int, size: int, seeds: int
) -> list[dict[str, Any]]:
    """Distance of states from the sum of the same rotations in float64, by length.

    Rotations are normal with a standard deviation of 0.3 rad.

    Args:
        forms: ways to compute the states, by name, and the greatest T of each.
        lengths: T.
        rows: B of a batch that is computed together.
        size: C.
        seeds: number of draws.

    Returns:
        Rows of form, length, and, in radians over the last `TAIL` positions: median over seeds, least and greatest of
        the root mean square (`rms`); the greatest error of all (`max`); the greatest difference between a row computed
        with the others and alone (`neighbours`).
    """
    found = []
    for length in lengths:
        for name, (form, longest) in forms.items():
            if length > longest:
                continue
            errors, worst, apart = [], 0.0, 0.0
            for seed in range(seeds):
                random = torch.Generator().manual_seed(seed)
                rotation = 0.3 * torch.randn(rows, length, size, generator=random)
                truth = rotation.double().cumsum(1)[:, -TAIL:]
                states = form(rotation)[:, -TAIL:]
                error = circular_difference(states.double(), truth)
                errors.append(float(error.square().mean().sqrt()))
                worst = max(worst, float(error.abs().max()))
                alone = form(rotation[-1:])[:, -TAIL:]
                apart = max(apart, float(circular_difference(states[-1:], alone).abs().max()))
            found.append({"form": name, "length": length, "rms": median(errors), "rms_low": min(errors),
                          "rms_high": max(errors), "max": worst, "neighbours": apart})  # fmt: skip
    return found


def text_batch(rows: int, length: int, step: int) -> dict[str, Tensor]:
    """A batch of a byte language model on the text that comes with Python: ids and labels `[B, T]`."""
    generator = torch.Generator().manual_seed(step)
    ids, _ = Filler("text").draw(rows, length + 1, generator).columns(0, length + 1)
    return {"input_ids": ids[:, :-1], "labels": ids[:, 1:]}


def loss_curve(config: PreTrainedConfig, precision: str, recipe: Recipe) -> list[float]:
    """Loss in nats after each step of a short training on text; it ends early where a loss is not finite.

    Args:
        config: of the model.
        precision: `float32`, `bf16 autocast`, or `bf16 weights` (weights, moments and activations).
        recipe: steps, batch size, length, learning rate, clip, and the seed of the initial weights; the data is always
            the same.
    """
    torch.manual_seed(recipe.seed)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(config).train()
    if precision == "bf16 weights":
        model = model.to(torch.bfloat16)
    optimizers, losses = build_optimizers(model, recipe), list[float]()
    for step in range(recipe.steps):
        batch = text_batch(recipe.batch_size, recipe.length, step)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16 autocast"):
            loss, _ = loss_of(model, batch)
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            break
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return losses
