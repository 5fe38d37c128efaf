"""The grids of `pmnet eval retrieval`: which problems of a task are measured, and what describes each."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from pmnet.data.tasks import CopyPaste, Filler, Lookup, Needle, Problem, Recall, SelectiveCopy, text_of
from pmnet.data.tasks.episodes import check_length
from pmnet.eval.ablate import recurrence_off
from pmnet.eval.retrieval import Score, measure
from pmnet.model import PMNetForCausalLM

WITHOUT_DEPTH = ("keys", "variables")  # needles that fill the text, or stand anywhere
CONTROL = 64  # greatest distance, in multiples of the reach, at which the memory is also switched off


@dataclass(frozen=True)
class Cell:
    """One problem of a grid.

    Attributes:
        problem: what is drawn.
        size: letters of a string, pairs, bytes of a text: whatever the task grows by.
        variant: kind of filler, key or needle.
        distance: bytes of filler (copy-paste) or depth of the needle.
        length: columns of an episode.
    """

    problem: Problem
    size: int
    variant: str
    distance: float
    length: int


@dataclass(frozen=True)
class Task:
    """What can be asked of a task, and what is by default.

    Attributes:
        sizes, variants, distances: defaults; distances are numbers, or multiples of the reach, as in `8x`.
        build: one problem from size, variant, distance and filler text.
        more: further variants.
    """

    sizes: tuple[int, ...]
    variants: tuple[str, ...]
    distances: tuple[str, ...]
    build: Callable[[int, str, float, Filler], Problem]
    more: tuple[str, ...] = ()


def _copy_paste(size: int, variant: str, distance: float, text: Filler) -> Problem:
    gap = int(distance)
    return CopyPaste((size, size), (gap, gap), (text if variant == "text" else Filler(variant),))


def _recall(size: int, variant: str, distance: float, text: Filler) -> Problem:
    return Recall({4: 64, 8: 128}.get(size, max(256, 4 * size)), size, int(variant))


TASKS = {
    "copy-paste": Task((8,), ("random",), ("0.5x", "2x", "8x", "64x"), _copy_paste, ("constant", "text")),
    "selective-copy": Task((16, 32), ("blank",), ("0",), lambda k, variant, _, text: SelectiveCopy(k, 16 * k)),
    "recall": Task((4, 8, 16, 32, 64, 128, 256), ("1", "2"), ("0",), _recall),
    "lookup": Task((20, 50, 100, 200, 500, 1000), ("suffix", "prefix"), ("0",),
                   lambda n, variant, _, text: Lookup((n, n), key=variant)),
    "needle": Task((1024, 8192, 65536, 524288), ("number", "pair", "keys", "variables"),
                   tuple(f"{depth / 10}" for depth in range(10)),
                   lambda n, variant, depth, text: Needle(n, depth, variant, text)),
}  # fmt: skip


def grid(
    task: str,
    reach: int | None,
    sizes: Sequence[int] = (),
    variants: Sequence[str] = (),
    distances: Sequence[str] = (),
    text: Path | None = None,
    rounds: int = 1,
) -> list[Cell]:
    """All problems of a task that `sizes`, `variants` and `distances` span; defaults where one is empty.

    Args:
        task: one of `TASKS`.
        reach: positions that a multiple of a distance stands for; None if the model has no reach.
        sizes, variants, distances: as in `Task`.
        text: file to take real text from.
        rounds: strings of an episode, the last of which is scored (copy-paste).

    Returns:
        Cells, distances innermost. One-byte recall of more than 127 pairs is left out, and needles that have no depth
        are measured once.

    Raises:
        ValueError: if the task, a size, a variant or a distance means nothing, or the task has none; if there are
            rounds or a text that the task does not use.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; there are {', '.join(TASKS)}")
    if rounds > 1 and task != "copy-paste":
        raise ValueError(f"--rounds {rounds} is for copy-paste, not for {task}")
    plan = TASKS[task]
    if distances and plan.distances == ("0",):
        raise ValueError(f"--distances: {task} has no distances, got {','.join(distances)!r}")
    known = (*plan.variants, *plan.more)
    for variant in variants:
        if variant not in known:
            raise ValueError(f"--variants: those of {task} are {', '.join(known)}, got {variant!r}")
    if text is not None and not (task == "needle" or "text" in (variants or plan.variants)):
        raise ValueError(f"--text {text}: only needles, and copy-paste with --variants text, read a text")
    filler = Filler("text", text=None if text is None else text_of(text))
    cells = []
    for variant in variants or plan.variants:
        for size in sizes or plan.sizes:
            if task == "recall" and variant == "1" and size > Recall().most:
                continue
            places = sorted({_distance(part, task, reach) for part in distances or plan.distances})
            for distance in places[:1] if variant in WITHOUT_DEPTH else places:
                try:
                    problem = plan.build(size, variant, distance, filler)
                    if isinstance(problem, CopyPaste) and rounds > 1:
                        problem = replace(problem, rounds=rounds, last=True)
                    length = problem.draw(1, torch.Generator()).length
                except ValueError as error:
                    several = f", --rounds {rounds}" if rounds > 1 else ""
                    raise ValueError(f"--sizes {size}{several}, variant {variant}: {error}") from error
                cells.append(Cell(problem, size, variant, distance, length))
    if not cells:
        raise ValueError(
            f"--sizes {min(sizes)}: recall with one-byte symbols (variant 1) has at most {Recall().most} pairs"
        )
    return cells


def _distance(text: str, task: str, reach: int | None) -> float:
    if text.endswith("x") and reach is None:
        raise ValueError(
            f"--distances: {text} is a multiple of the reach, which this model lacks: pass --reach, or give bytes"
        )
    try:
        value = float(text.removesuffix("x"))
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise ValueError(f"--distances: each is a number, or a multiple of the reach such as 8x, not {text!r}")
    if text.endswith("x") and value:
        value = max(1, round(value * (reach or 0)))
    if task == "copy-paste" and value != round(value):
        raise ValueError(f"--distances: filler is of whole bytes, not {text!r}")
    if task == "needle" and value > 1:
        raise ValueError(f"--distances: the depth of a needle is from 0 to 1, not {text!r}")
    return value + 0.0  # no -0


def check_cells(model: PreTrainedModel, cells: Sequence[Cell]) -> None:
    """ValueError if an episode is too long for a model that reads it at once, as all but a PMNet do."""
    if not isinstance(model, PMNetForCausalLM):
        check_length(max(cell.length for cell in cells))


def measure_cell(
    model: PreTrainedModel,
    cell: Cell,
    strings: int,
    seed: int,
    rows: int,
    control: bool,
    on_bytes: Callable[[int], None] = lambda n: None,
) -> dict[str, Any]:
    """Score one cell, for a PMNet and `control` once more with its recurrence off, on the same strings.

    Returns:
        JSON-able values: size, variant, distance, the fields of `Score`, and those of the control, or None.
    """
    score = measure(model, cell.problem, strings, seed, rows, on_bytes)
    off: Score | None = None
    if control and controlled(model, cell):
        assert isinstance(model, PMNetForCausalLM)
        with recurrence_off(model):
            off = measure(model, cell.problem, strings, seed, rows, on_bytes)
    described = {"size": cell.size, "variant": cell.variant, "distance": cell.distance}
    return described | score.facts() | {"control": None if off is None else off.facts()}


def controlled(model: PreTrainedModel, cell: Cell) -> bool:
    """Whether the memory can be switched off for this cell: a PMNet, not too far."""
    return isinstance(model, PMNetForCausalLM) and cell.distance <= CONTROL * model.config.receptive_field
