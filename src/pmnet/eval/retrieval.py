"""Copy-paste over distance: the share of strings reproduced exactly, with memory and without.

The string is answered byte by byte through the streaming state, the way a user would meet the model: distance costs
time, never memory.
"""

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pmnet.data.copy_paste import copy_batch
from pmnet.model import PMNetCache, PMNetForCausalLM

CHUNK = 1024


@dataclass(frozen=True)
class Cell:
    """One row of the table.

    Attributes:
        gap: filler bytes between string and paste marker.
        reach: receptive field of the attention stack.
        strings: strings tried.
        exact, low, high: share of strings reproduced exactly, and its 95 % Wilson interval.
        letters: share of single letters right.
        control: share of strings exact with the recurrence switched off (same weights).
        control_letters: share of letters right with the recurrence switched off.
    """

    gap: int
    reach: int
    strings: int
    exact: float
    low: float
    high: float
    letters: float
    control: float
    control_letters: float

    def facts(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)


def wilson(hits: int, trials: int, z: float = 1.959964) -> tuple[float, float]:
    """Wilson score interval of a proportion.

    Args:
        hits: successes.
        trials: at least 1.
        z: normal quantile; 1.96 for 95 %.

    Returns:
        Lower and upper bound.
    """
    share, spread = hits / trials, z * z / trials
    centre = (share + spread / 2) / (1 + spread)
    half = z * math.sqrt(share * (1 - share) / trials + spread / (4 * trials)) / (1 + spread)
    return max(0.0, centre - half), min(1.0, centre + half)


@torch.no_grad()
def copied(model: PMNetForCausalLM, prompts: Tensor, strings: Tensor) -> Tensor:
    """Which letters come out right when the model writes greedily after its prompt.

    Args:
        model: in eval mode.
        prompts: everything up to and including the paste marker, int64 `[B, T]`.
        strings: what should follow, `[B, k]`.

    Returns:
        bool `[B, k]`.
    """
    cache = PMNetCache(model.config, prompts.shape[0], model.device, model.dtype)
    for part in prompts.split(CHUNK, dim=1):
        logits = model(part, past_key_values=cache, logits_to_keep=1).logits
    written = []
    for _ in range(strings.shape[1]):
        written.append(logits[:, -1].argmax(-1, keepdim=True))
        logits = model(written[-1], past_key_values=cache).logits
    return torch.cat(written, dim=1) == strings


@contextmanager
def recurrence_off(model: PMNetForCausalLM) -> Any:
    """The published ablation on a loaded model: states are single rotations, nothing accumulates."""
    before = model.config.memory_cumsum
    model.config.memory_cumsum = False
    try:
        yield
    finally:
        model.config.memory_cumsum = before


def retrieval_table(
    model: PMNetForCausalLM,
    gaps: list[int],
    length: int,
    strings: int,
    seed: int,
    batch_size: int = 128,
    on_row: Callable[[Cell], None] = lambda cell: None,
) -> list[Cell]:
    """Measure every gap with the memory on and off, on the same strings.

    Args:
        model: trained on copy-paste, in eval mode.
        gaps: filler lengths.
        length: letters of a string.
        strings: strings per gap.
        seed: of the strings and the filler.
        batch_size: strings read at once.
        on_row: called with each finished row.

    Returns:
        One cell per gap.
    """
    reach, cells = model.config.receptive_field, []
    for gap in gaps:
        generator = torch.Generator().manual_seed(seed * 2**32 + gap)
        right, control = [], []
        for start in range(0, strings, batch_size):
            batch = copy_batch(min(batch_size, strings - start), length, (gap, gap), 0, generator)
            prompts = batch.input_ids[:, :-length]
            right.append(copied(model, prompts, batch.strings))
            with recurrence_off(model):
                control.append(copied(model, prompts, batch.strings))
        on, off = torch.cat(right), torch.cat(control)
        hits = int(on.all(1).sum())
        low, high = wilson(hits, strings)
        cells.append(
            Cell(gap, reach, strings, hits / strings, low, high, on.float().mean().item(),
                 off.all(1).float().mean().item(), off.float().mean().item())
        )  # fmt: skip
        on_row(cells[-1])
    return cells
