"""How a model solves copy-paste: where it writes and reads, how much it turns, what breaks when a level is taken away.

Shapes: B sequences, T columns, k letters, N slots, M phases, R read heads.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from pmnet.data.tasks import CopyPaste, Episodes, Filler
from pmnet.data.tasks.copy_paste import asked
from pmnet.eval.ablate import anchors_off
from pmnet.eval.retrieval import CHUNK, columns_at_once
from pmnet.memory import MemoryRead, MemoryWrite
from pmnet.model import PMNetCache, PMNetForCausalLM
from pmnet.ops import address, to_angle, to_turns


@torch.no_grad()
def mechanism(model: PMNetForCausalLM, length: int, gap: int, strings: int, drift: int, seed: int) -> dict[str, Any]:
    """Everything this module measures, as JSON-able values.

    Args:
        model: a PMNet trained on copy-paste, in eval mode.
        length: k.
        gap: random filler between string and paste marker.
        strings: episodes.
        drift: bytes of filler to stream for the drift of the state.
        seed: of the episodes.

    Returns:
        `levels`: per level, occupancy, rotations, agreement and drift; `without`: shares of exact strings and of right
        bytes with nothing taken away, with the state of one level set to zero before PASTE, and with its anchors zero.
    """
    problem = CopyPaste((length, length), (gap, gap))
    episodes = problem.draw(strings, torch.Generator().manual_seed(seed))
    with traced(model) as traces:
        model(episodes.dense()[0][:, :-1], use_cache=False)
    string = slice(1, length + 1)  # COPY is column 0
    paste = length + 2 + gap
    answer = slice(paste, paste + length)  # letter j is written one column before it stands
    filler = slice(length + 2 + model.config.receptive_field, paste)
    drifts = _drift(model, drift, seed)
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
                **drifts[level],
            }
        )  # fmt: skip
    names = ["nothing", *(f"{what} {level}" for level in range(len(traces)) for what in ("state", "anchors"))]
    return {"levels": levels, "without": {name: _without(model, episodes, length, name) for name in names}}


Trace = tuple[dict[str, Tensor], list[Tensor]]


@contextmanager
def traced(model: PMNetForCausalLM) -> Iterator[list[Trace]]:
    """Fills a list with what each level does with each column of the one call that is made inside, level by level.

    Of its write: group and slot `[B, T]`, weights of the slots `[B, T, N]`, theta in radians `[B, T, M]`, share of
    rotations that are not zero, `[B, T]`. Of each of its reads: the slot that a head looks at most, `[B, T, R]`.
    """
    found: list[Trace] = []
    bits = model.config.phase_bits

    def wrote(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, MemoryWrite)
        hidden, visit, anchors = inputs[:3]
        weights, raw = module.propose(hidden, visit, anchors)
        theta = to_angle(raw)
        turns = to_turns(weights.unsqueeze(-1) * theta.unsqueeze(2), bits)
        found.append(({"group": visit.groups, "slot": weights.argmax(2), "weights": weights, "theta": theta,
                       "turned": (turns != 0).float().mean((2, 3))}, []))  # fmt: skip

    def read(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, MemoryRead)
        hidden, geometry = inputs
        query = module.proj_q(module.norm(hidden)).unflatten(-1, (module.heads, module.size))
        weight, bias = (tensor.chunk(2)[0] for tensor in (module.proj_kv.weight, module.proj_kv.bias))
        keys = nn.functional.linear(geometry, weight, bias).unflatten(-1, (module.heads, module.size))
        found[-1][1].append(address(query, keys).argmax(2))

    hooks = [
        module.register_forward_hook(wrote if isinstance(module, MemoryWrite) else read)
        for module in model.modules()
        if isinstance(module, MemoryWrite | MemoryRead)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def spread_of_writes(write: dict[str, Tensor]) -> dict[str, float]:
    """Whether the writes of a level say anything, from its trace.

    Returns:
        `theta`: mean |theta| in radians; `constant`: the part of it that is the same at every column, |mean over
        columns| as a share of it; `slots_written` and `groups_visited`: over how many slots a column's write is
        spread, and all columns over groups, as the exponential of the entropy.
    """
    weights, theta, size = write["weights"].double(), write["theta"].double(), float(write["theta"].abs().mean())
    return {
        "theta": size,
        "constant": float(theta.mean(1).abs().mean()) / size if size else 0.0,
        "slots_written": float(torch.special.entr(weights).sum(2).exp().mean()),
        "groups_visited": _effective(write["group"]),
    }


def _rotations(write: dict[str, Tensor], columns: slice) -> dict[str, Any]:
    """Where these columns go on a level and how much they turn there."""
    groups = write["group"][:, columns]
    return {
        "groups_visited": len(groups.unique()),
        "groups_effective": _effective(groups),
        "mean_theta_radians": float(write["theta"][:, columns].abs().mean()),
        "turned": float(write["turned"][:, columns].mean()),
        "columns_that_turn": _share(write["turned"][:, columns] > 0),
    }


def _effective(groups: Tensor) -> float:
    """Number of groups that as evenly visited ones would have the same entropy."""
    share = torch.bincount(groups.flatten()).double() / groups.numel()
    return float(torch.special.entr(share).sum().exp())


def _drift(model: PMNetForCausalLM, count: int, seed: int, rows: int = 8) -> list[dict[str, float]]:
    """How far `count` bytes of random filler turn the state, once attention sees only filler, per level."""
    filling = Filler().draw(rows, count + CHUNK, torch.Generator().manual_seed(seed))
    cache, before = PMNetCache(model.config, rows), list[Tensor]()
    for start in range(0, count + CHUNK, CHUNK):
        model(filling.columns(start, min(start + CHUNK, count + CHUNK))[0], past_key_values=cache, logits_to_keep=1)
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
