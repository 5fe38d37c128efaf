"""Retrieval: the share of answers that come back exactly, measured through the streaming state.

An episode is read chunk by chunk, so distance costs time, never memory. The model is fed the true answer while it is
scored: an answer is exact when every byte of it is the model's first choice, which is when greedy generation would
write the same.

Shapes: B sequences, A answer bytes of a sequence.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from pmnet.baselines import matrix_scan
from pmnet.data.tasks import Episodes, Problem
from pmnet.model import PMNetCache, PMNetForCausalLM

CHUNK = 1024  # columns of one sequence that are read at once; of many, fewer, so that a call stays in the caches
POSITIONS = 32_768


def columns_at_once(rows: int) -> int:
    """Columns of `rows` sequences to read in one call; the result is the same for any."""
    return max(1, min(CHUNK, POSITIONS // rows))


@dataclass(frozen=True)
class Score:
    """How well a problem is solved.

    Attributes:
        strings: answers tried.
        exact, low, high: share of answers that are exact, and its 95 % Wilson interval.
        letters: share of single bytes right; EOS, which is part of some answers, is not counted.
        places: share of answers that are right at their first byte, their second and so on, EOS included.
    """

    strings: int
    exact: float
    low: float
    high: float
    letters: float
    places: tuple[float, ...]

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
    return max(0.0, min(share, centre - half)), min(1.0, max(share, centre + half))  # never by rounding past the share


@torch.no_grad()
def answers(
    model: PreTrainedModel, episodes: Episodes, on_bytes: Callable[[int], None] = lambda n: None
) -> tuple[Tensor, Tensor]:
    """Which ids of the answers are the model's first choice.

    Args:
        model: in eval mode. A PMNet reads the episodes in chunks through its state; any other model at once.
        episodes: what to read; all sequences have equally many answer bytes.
        on_bytes: called with the number of bytes read since the last call.

    Returns:
        Whether each is, bool `[B, A]`, and the ids, `[B, A]`.
    """
    right, wanted, scored = [], [], []
    for predicted, ids, asked in _read(model, episodes, on_bytes):
        right.append(predicted == ids)
        wanted.append(ids)
        scored.append(asked)
    places = torch.cat(scored, dim=1)
    found, ids = (torch.cat(parts, dim=1)[places].view(len(places), -1) for parts in (right, wanted))
    return found, ids


def _read(
    model: PreTrainedModel, episodes: Episodes, on_bytes: Callable[[int], None]
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """First choices for each column, ids and whether they are answers, chunk by chunk `[B, c]`; the first choice for
    the very first column is -1. Chunks without an answer are left out, but for what comes next."""
    streams = isinstance(model, PMNetForCausalLM)
    cache = None
    chosen: Tensor | None = None
    for ids, asked in episodes.chunks(columns_at_once(episodes.rows)) if streams else [episodes.dense()]:
        if ids.shape[1] == 0:
            continue
        if streams and cache is None:
            cache = PMNetCache(model.config, ids.shape[0], model.device, model.dtype)
        before = torch.full_like(ids[:, :1], -1) if chosen is None else chosen
        any_asked = bool(asked.any())
        keep = ids.shape[1] if any_asked else 1
        with matrix_scan(model):
            logits = model(ids.to(model.device), past_key_values=cache, use_cache=streams, logits_to_keep=keep).logits
        first = logits.argmax(-1).cpu()
        if any_asked:
            yield torch.cat([before, first[:, :-1]], dim=1), ids, asked
        chosen = first[:, -1:]
        on_bytes(ids.numel())


def measure(
    model: PreTrainedModel,
    problem: Problem,
    strings: int,
    seed: int,
    rows: int = 128,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> Score:
    """Score `strings` episodes of a problem.

    Args:
        model: in eval mode.
        problem: what to draw.
        strings: episodes.
        seed: of the draw; the same episodes come for the same seed and `rows`.
        rows: episodes read at once.
        on_bytes: called with the number of bytes read since the last call, for a progress bar.

    Returns:
        The score.
    """
    generator, exact, right, letters = torch.Generator().manual_seed(seed), 0, 0, 0
    places, tried = torch.zeros(2, 0, dtype=torch.long)
    for start in range(0, strings, rows):
        count = min(rows, strings - start)
        found, ids = answers(model, problem.draw(count, generator), on_bytes)
        exact += int(found.all(1).sum())
        right += int(found[ids < 256].sum())
        letters += int((ids < 256).sum())
        places, tried = _added(places, found.sum(0)), _added(tried, torch.ones_like(found).sum(0))
    by_place = tuple((places.double() / tried).tolist())
    return Score(strings, exact / strings, *wilson(exact, strings), right / letters, by_place)


def _added(one: Tensor, other: Tensor) -> Tensor:
    """The sum of two vectors, the shorter one padded with zeros."""
    return torch.nn.utils.rnn.pad_sequence([one, other]).sum(1)
