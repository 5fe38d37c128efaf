"""How a model solves copy-paste: where it writes and reads, how much it turns, what breaks when a level is taken away.

Shapes: B sequences, T columns, k letters.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from pmnet.data.tasks import CopyPaste, Episodes, Filler
from pmnet.data.tasks.copy_paste import asked
from pmnet.data.tasks.episodes import check_length
from pmnet.eval.ablate import anchors_off
from pmnet.eval.retrieval import CHUNK, columns_at_once
from pmnet.eval.traces import Trace, effective, traced
from pmnet.model import PMNetCache, PMNetForCausalLM

ROWS = 8  # streams of filler


@torch.no_grad()
def mechanism(
    model: PMNetForCausalLM,
    length: int,
    gap: int,
    strings: int,
    drift: int,
    seed: int,
    on_bytes: Callable[[int, int], None] = lambda n, total: None,
) -> dict[str, Any]:
    """Everything this module measures, as JSON-able values.

    Args:
        model: a PMNet trained on copy-paste, in eval mode.
        length: k.
        gap: random filler between string and paste marker.
        strings: episodes.
        drift: bytes of filler to stream for the drift of the state.
        seed: of the episodes.
        on_bytes: called with the number of bytes read since the last call, and of all that will be read.

    Raises:
        ValueError: if `problem_of` does.

    Returns:
        `levels`: per level, occupancy, rotations, agreement, drift, and `places`: what each letter of a string turns;
        `right`: share of strings that have each letter right; `without`: shares of exact strings and of right bytes
        with nothing taken away, with the state of one level set to zero before PASTE, and with its anchors zero.
    """
    episodes = problem_of(model, length, gap).draw(strings, torch.Generator().manual_seed(seed))
    taken = [f"{what} {level}" for level in range(model.config.num_levels) for what in ("state", "anchors")]
    names, each = ["nothing", *taken], strings * episodes.length
    total = each * (1 + len(names)) + ROWS * (drift + CHUNK)

    def advance(count: int) -> None:
        on_bytes(count, total)

    ids = episodes.dense()[0]
    traces, chosen = _traced(model, ids[:, :-1], length + 1)
    advance(each)
    string = slice(1, length + 1)  # COPY is column 0
    paste = length + 2 + gap
    answer = slice(paste, paste + length)  # letter j is written one column before it stands
    filler = slice(length + 2 + model.config.receptive_field, paste)
    drifts = _drift(model, drift, seed, advance)
    levels = []
    for level, (write, reads) in enumerate(traces):
        levels.append(
            {
                "groups": model.config.groups_of(level),
                "letters": _rotations(write, string),
                "filler": _rotations(write, filler),
                "same_group": _share(write["group"][:, string] == write["group"][:, answer]),
                "same_slot": [
                    _share(write["slot"][:, string].unsqueeze(2) == read[:, answer]) for read in reads
                ],
                "places": _places(write, string),
                **drifts[level],
            }
        )  # fmt: skip
    without = {}
    for name in names:
        without[name] = _without(model, episodes, length, name)
        advance(each)
    right = (chosen == ids[:, -length - 1 :])[:, :-1].float().mean(0).tolist()
    return {"levels": levels, "right": right, "without": without}


def problem_of(model: PMNetForCausalLM, length: int, gap: int) -> CopyPaste:
    """What the model is asked: strings of `length` letters behind a gap of random filler.

    Raises:
        ValueError: if the gap is within the reach of the attention: no filler is then beyond it; if an episode is too
            long to be read at once.
    """
    if gap <= model.config.receptive_field:
        raise ValueError(f"a gap of {gap} bytes is within the reach of attention, {model.config.receptive_field}")
    problem = CopyPaste((length, length), (gap, gap))
    check_length(problem.draw(1, torch.Generator()).length)
    return problem


def _traced(model: PMNetForCausalLM, ids: Tensor, keep: int) -> tuple[list[Trace], Tensor]:
    """What every level does with ids `[B, T]`, and the first choices for the last `keep` columns, some rows at once."""
    found, chosen = list[list[Trace]](), list[Tensor]()
    for rows in ids.split(columns_at_once(ids.shape[1])):
        with traced(model) as traces:
            chosen.append(model(rows, use_cache=False, logits_to_keep=keep).logits.argmax(-1))
        found.append(traces)
    joined = [
        (
            {name: torch.cat([write[name] for write, _ in parts]) for name in parts[0][0]},
            [torch.cat(reads) for reads in zip(*(reads for _, reads in parts), strict=True)],
        )
        for parts in zip(*found, strict=True)
    ]
    return joined, torch.cat(chosen)


def _rotations(write: dict[str, Tensor], columns: slice) -> dict[str, Any]:
    """Where these columns go on a level and how much they turn there."""
    groups = write["group"][:, columns]
    return {
        "groups_visited": len(groups.unique()),
        "groups_effective": effective(groups),
        "mean_theta_radians": float(write["theta"][:, columns].abs().mean()),
        "turned": float(write["turned"][:, columns].mean()),
        "columns_that_turn": _share(write["turned"][:, columns] > 0),
    }


def _places(write: dict[str, Tensor], columns: slice) -> list[dict[str, Any]]:
    """Of each letter of a string: the group and slot it mostly turns, how often, its weight there, share of turns."""
    slots = write["weights"].shape[2]
    found = []
    for group, slot, weights, turned in zip(
        *(write[name][:, columns].unbind(1) for name in ("group", "slot", "weights", "turned")), strict=True
    ):
        place = group * slots + slot
        usual = int(place.mode().values)
        found.append(
            {
                "group": usual // slots,
                "slot": usual % slots,
                "share": _share(place == usual),
                "weight": float(weights[:, usual % slots].mean()),
                "turned": float(turned.mean()),
            }
        )
    return found


def _drift(model: PMNetForCausalLM, count: int, seed: int, advance: Callable[[int], None]) -> list[dict[str, float]]:
    """How far `count` bytes of random filler turn the state, once attention sees only filler, per level."""
    filling = Filler().draw(ROWS, count + CHUNK, torch.Generator().manual_seed(seed))
    cache, before = PMNetCache(model.config, ROWS), list[Tensor]()
    for start in range(0, count + CHUNK, CHUNK):
        ids = filling.columns(start, min(start + CHUNK, count + CHUNK))[0]
        model(ids, past_key_values=cache, logits_to_keep=1)
        advance(ids.numel())
        before = before or [level.clone() for level in cache.memory]
    turned = [(after - level).double() / 2**32 for level, after in zip(before, cache.memory, strict=True)]
    return [
        {"drift_bytes": count, "drift_phases": _share(turn != 0), "drift_rms_turns": float(turn.square().mean().sqrt())}
        for turn in turned
    ]


def _without(model: PMNetForCausalLM, episodes: Episodes, length: int, name: str) -> dict[str, float]:
    """Shares of exact strings and right bytes with the state or the anchors of one level set to zero."""
    what, level = [*name.split(), "0"][:2]
    rows = episodes.dense()[0]
    ids, strings = rows[:, : -length - 2], rows[:, -length - 1 :]
    with anchors_off(model, [int(level)]) if what == "anchors" else nullcontext():
        cache = PMNetCache(model.config, len(ids))
        for part in ids.split(columns_at_once(len(ids)), dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        if what == "state":
            cache.memory[int(level)].zero_()
        logits = model(asked(strings[:, :-1]).columns(0, length + 1)[0], past_key_values=cache).logits
    right = logits.argmax(-1) == strings
    return {"exact": _share(right.all(1)), "letters": _share(right[:, :-1])}


def _share(mask: Tensor) -> float:
    return float(mask.float().mean())
