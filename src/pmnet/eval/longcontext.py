"""Bits per byte by position: whole books, side by side, through any model at constant memory.

Every book gives one number for each bin of positions, so that models are compared book by book.

Shapes: B books, c columns of a chunk.
"""

import math
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from statistics import fmean, linear_regression
from typing import Any

import psutil
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pmnet.baselines import Carry, carries
from pmnet.config import PMNetConfig
from pmnet.data.files import ByteFiles
from pmnet.eval.ablate import anchors_off, recurrence_off
from pmnet.eval.traces import Trace, spread_of_writes, traced
from pmnet.model import PMNetForCausalLM
from pmnet.model.tokenizer import first_id
from pmnet.ops import to_radians

CHUNK = 1024
POINTS = (1024, 8192, 65536)  # positions that tables look beyond
FIRST = 64  # upper edge of the first bin; each further one is twice as far


@dataclass(frozen=True)
class Mode:
    """How the state is handled.

    Attributes:
        name: of the row.
        reset: forget everything every so many bytes; None carries the state from the first byte to the last.
        recurrence: False is the published ablation of a PMNet, on the same weights.
        without: levels of a PMNet whose anchors are zero.
    """

    name: str
    reset: int | None = None
    recurrence: bool = True
    without: tuple[int, ...] = ()


def modes_of(model: PreTrainedModel, resets: list[int], ablations: bool = False) -> list[Mode]:
    """All rows for a model: carried, where its state has a constant size; each reset; and a PMNet without recurrence.

    With `ablations` a PMNet is also read with the anchors of its root, of its leaves, and of all levels set to zero.

    Raises:
        ValueError: if the model can neither be carried nor is it to be reset.
    """
    found = [Mode("carried")] if carries(model.config) else []
    found += [Mode(f"reset every {n}", n) for n in resets]
    if isinstance(model, PMNetForCausalLM) and model.config.memory_cumsum:
        found.append(Mode("recurrence off", None, False))
    if ablations and isinstance(model, PMNetForCausalLM):
        levels = range(model.config.num_levels)
        found += [Mode("anchors zero: root", without=(0,)), Mode("anchors zero: leaves", without=(levels[-1],)),
                  Mode("anchors zero: all", without=tuple(levels))]  # fmt: skip
    if not found:
        raise ValueError(f"a {model.config.model_type} has no state of constant size to carry: say --reset BYTES")
    return found


def edges(length: int) -> list[int]:
    """Upper edges of the bins of positions: 64, 128, 256, ... and `length` itself."""
    found = [FIRST * 2**n for n in range(max(1, length).bit_length()) if FIRST * 2**n < length]
    return [*found, length]


def whole_books(files: ByteFiles, length: int) -> list[int]:
    """Indices of the files that are at least `length` bytes long.

    Raises:
        ValueError: if there are none.
    """
    found = [index for index, size in enumerate(files.sizes) if size >= length]
    if not found:
        raise ValueError(f"no file has {length:,} bytes; the longest of {len(files.sizes)} has {max(files.sizes):,}")
    return found


@torch.no_grad()
def bits_by_position(
    model: PreTrainedModel,
    files: ByteFiles,
    length: int,
    mode: Mode,
    on_bytes: Callable[[int], None] = lambda count: None,
) -> dict[str, Any]:
    """Read the first `length` bytes of every file that is as long, all of them side by side.

    Args:
        model: in eval mode.
        files: books; shorter ones are left out.
        length: bytes to read of each.
        mode: how to handle the state.
        on_bytes: called with the number of bytes of each finished chunk.

    Returns:
        JSON-able values: `bits`, for each book the mean bits per byte of each bin (see `edges`); `total`, bits per
        byte of all; `word_perplexity`, `exp` of the nats per white-space separated word; `bytes_per_second`;
        `state_bytes` of one book; `resident` memory of the process at the end, in bytes; for a PMNet the `memory` at
        the end of the books (see `memory_facts`), and how the last chunk was written (see `spread_of_writes`).
    """
    books = whole_books(files, length)
    bins = torch.tensor(edges(length))
    sums, words = torch.zeros(len(books), len(bins), dtype=torch.float64), 0
    carry = Carry(model, len(books)) if carries(model.config) else None
    period = mode.reset or length
    phases = model.config.model_type == PMNetConfig.model_type
    traces: list[Trace] = []
    started, before = time.perf_counter(), torch.full((len(books), 1), first_id(model.config))
    with ExitStack() as changes:
        if not mode.recurrence:
            changes.enter_context(recurrence_off(model))
        changes.enter_context(anchors_off(model, mode.without) if mode.without else nullcontext())
        start = 0
        while start < length:
            fresh = start % period == 0
            stop = min(length, start - start % period + period)
            stop = stop if carry is None else min(stop, start + CHUNK)  # without a state, a period is read at once
            target = torch.tensor([list(files.read(book, start, stop)) for book in books])
            if carry is not None and fresh:
                carry.reset()
            ids = torch.cat([before, target[:, :-1]], dim=1).to(model.device)
            if phases and stop == length:
                traces = changes.enter_context(traced(model))
            logits = carry.read(ids) if carry is not None else model(ids, use_cache=False).logits
            nats = _nats(logits, target.to(model.device)).cpu()
            places = torch.bucketize(torch.arange(start, stop), bins, right=True)
            sums.index_add_(1, places, nats)
            start, before = stop, target[:, -1:]
            on_bytes(target.numel())
    seconds = time.perf_counter() - started
    for book in books:
        words += len(files.read(book, 0, length).split())
    widths = bins.diff(prepend=bins.new_zeros(1))
    total = float(sums.sum())
    return {
        "mode": mode.name,
        "reset": mode.reset,
        "books": [files.paths[book].stem for book in books],
        "edges": bins.tolist(),
        "bits": (sums / widths / math.log(2)).tolist(),
        "total": total / (len(books) * length) / math.log(2),
        "word_perplexity": math.exp(min(700.0, total / max(1, words))),
        "bytes_per_second": len(books) * length / seconds,
        "state_bytes": None if carry is None else carry.nbytes // len(books),
        "resident": psutil.Process().memory_info().rss,
        "memory": [
            level | spread_of_writes(write)
            for level, (write, _) in zip(memory_facts(carry.cache.memory), traces, strict=True)
        ]
        if carry is not None and phases
        else None,
    }


def memory_facts(memory: list[Tensor]) -> list[dict[str, float]]:
    """How full each level is, over all books: whether its phases have saturated.

    Args:
        memory: int32 turns by level, `[B, G, N, M]`.

    Returns:
        For each level `groups`, `slots` and `phases`, the shares that have been turned at all, and `resultant`, the
        length of the mean of the turned phases as points on the unit circle: 1 for one direction, 0 for none.
    """
    found = []
    for level in memory:
        turned = level != 0
        points = torch.polar(torch.ones(()), to_radians(level[turned]))
        found.append(
            {
                "groups": float(turned.flatten(2).any(2).float().mean()),
                "slots": float(turned.any(3).float().mean()),
                "phases": float(turned.float().mean()),
                "resultant": float(points.mean().abs()) if len(points) else 1.0,
            }
        )
    return found


def _nats(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of each byte, float64 `[B, c]`."""
    return F.cross_entropy(logits.transpose(1, 2).float(), target, reduction="none").double()


def beyond(row: dict[str, Any], position: int) -> list[float]:
    """Bits per byte of each book over all bins that begin at `position` or later (empty if there are none)."""
    lower = [0, *row["edges"][:-1]]
    kept = [index for index, low in enumerate(lower) if low >= position]
    widths = [row["edges"][index] - lower[index] for index in kept]
    return [sum(b[i] * w for i, w in zip(kept, widths, strict=True)) / sum(widths) for b in row["bits"]] if kept else []


def slope(row: dict[str, Any], position: int) -> float | None:
    """Bits per byte gained with every doubling of the position, from the bins that begin at `position` or later.

    The least-squares slope of the mean over books, against the base-2 logarithm of the bins' upper edges; None with
    fewer than two bins. Negative where more context helps.
    """
    kept = [index for index, low in enumerate([0, *row["edges"][:-1]]) if low >= position]
    if len(kept) < 2:
        return None
    means = [fmean(book[index] for book in row["bits"]) for index in kept]
    return linear_regression([math.log2(row["edges"][index]) for index in kept], means).slope
