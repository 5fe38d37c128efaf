"""Gradients through time: how a change of the state, or of a write, is felt n positions later.

Curves over n, exact to rounding (no finite differences):

- `state`: the gain `|J v| / |v|` of `J = d state(t + n) / d state(t)` in random directions v; its root mean square is
  the Frobenius norm of J over the root of its width. Recurrent models: the whole state, forward-mode products with
  J, step by step. Memory trees, by level: no write of a level depends on the state of that level, so this block of
  J is diagonal; it is the backward of the write operator, applied to a random direction.
- `hand-down` (trees): the gain of the block `d S_last(t + n) / d S_root(t)`: what the lowest level owes to the root
  through addresses, reads and attention. Reverse mode through the whole sequence, so by the transposed block.
- `loss`: `|d loss(t + n) / d state(t)|`, of the loss at position t + n alone. It is also `d loss / d write(t)` for
  trees, where a write is added to the state. Reverse mode.

Curves of a level are those of the group that position t + n visits.

Rounded rotations (`phase_bits`) have the straight-through derivative in the last two.

Shapes: B sequences, T positions, N slots, M phases.
"""

import math
from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
import torch.autograd.forward_ad as dual
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pmnet.baselines.memories import PlainWrite
from pmnet.eval.gradients.recurrences import Recurrence, State, recurrence
from pmnet.eval.gradients.trees import read_levels, shift_is_exact
from pmnet.model import PMNetForCausalLM

WARM = 64  # positions read before t, so that the state is a usual one
# how far each kind of model goes: n of the forward-mode curve, n of the reverse-mode ones
FURTHEST = {
    "PMNet": (65_536, 65_536),
    "pmnet-variant": (4096, 4096),  # its states come from a T x T matrix
    "pmnet-lstm": (65_536, 4096),
    "pmnet-ntm": (8192, 1024),
    "mamba": (8192, 1024),
}


def jacobian(model: PreTrainedModel, positions: int, rows: int, seed: int) -> dict[str, Any]:
    """Every curve of one model, as JSON-able values.

    Args:
        model: a model named in `FURTHEST`, in eval mode, on the CPU.
        positions: greatest n, within `FURTHEST`.
        rows: B, sequences and directions.
        seed: of bytes, which are random, and of directions.

    Returns:
        `curves`: by name, lists of `{n, median, low, high}` over rows of the base-10 logarithm, None for zero. For a
        phase memory also `shift_exact`: by level, whether an integer that is added to the state at the start is, to the
        bit, what it differs by `positions` later.

    Raises:
        ValueError: if `check_through_time` does.
    """
    check_through_time(model)
    forward, reverse = (min(positions, limit) for limit in FURTHEST[model.config.model_type])
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 256, (rows, WARM + max(forward, reverse) + 1), generator=generator)
    if isinstance(model, PMNetForCausalLM):
        found: dict[str, Any] = {"curves": of_tree(model, ids[:, : WARM + reverse + 1], generator)}
        if not any(isinstance(module, PlainWrite) for module in model.modules()):
            found["shift_exact"] = shift_is_exact(model, ids[:1, : WARM + forward])
        return found
    one = recurrence(model)
    state = forward_gain(one, ids[:, : WARM + forward], generator)
    return {"curves": {"state": state, "loss": loss_gradient(one, ids[:, : WARM + reverse + 1])}}


def check_through_time(model: PreTrainedModel) -> None:
    """ValueError if the model is of no kind named in `FURTHEST`, or a PMNet with its recurrence off."""
    kind = model.config.model_type
    if kind not in FURTHEST:
        raise ValueError(f"no gradients through time for {kind!r}; there are {', '.join(FURTHEST)}")
    if getattr(model.config, "memory_cumsum", True) is False:
        raise ValueError("no gradients through time without recurrence: memory_cumsum is off in this model")


def distances(longest: int) -> list[int]:
    """1, 2, 4, ... up to `longest`."""
    return [2**k for k in range(longest.bit_length()) if 2**k <= longest]


def forward_gain(one: Recurrence, ids: Tensor, generator: torch.Generator) -> list[dict[str, Any]]:
    """Gain of the state Jacobian from position `WARM` on: ids `[B, WARM + n]`. The direction is kept at length 1."""
    state, found = one.start(len(ids)), []
    wanted = distances(ids.shape[1] - WARM)
    with torch.no_grad():
        for column in ids[:, :WARM].unbind(1):
            state = one.step(column, state)[1]
        direction, gain = _of_length_one([torch.randn(part.shape, generator=generator) for part in state])
        gain = torch.zeros_like(gain)
        for n, column in enumerate(ids[:, WARM:].unbind(1), start=1):
            state, moved = _pushed(one, column, state, direction)
            direction, length = _of_length_one(moved)
            gain = gain + length.log10()
            if n in wanted:
                found.append(_point(n, gain))
    return found


def _of_length_one(direction: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The direction of each row scaled to length 1 (left as it is where it is 0), and its length, float64 `[B]`."""
    length = _norm(direction)
    scale = torch.where(length > 0, length, 1).to(direction[0].dtype)
    return [part / scale.view(-1, *[1] * (part.dim() - 1)) for part in direction], length


def _norm(parts: Sequence[Tensor]) -> Tensor:
    return torch.cat([part.double().flatten(1) for part in parts], dim=1).norm(dim=1)


def _pushed(one: Recurrence, ids: Tensor, state: State, direction: Sequence[Tensor]) -> tuple[State, list[Tensor]]:
    """The state after one position, and the product of the step's Jacobian with `direction`."""
    with dual.dual_level():
        duals = tuple(dual.make_dual(part, along) for part, along in zip(state, direction, strict=True))
        parts = [dual.unpack_dual(part) for part in one.step(ids, duals)[1]]
        after = tuple(part.primal for part in parts)
        moved = [torch.zeros_like(p.primal) if p.tangent is None else p.tangent for p in parts]
    return after, moved


def loss_gradient(one: Recurrence, ids: Tensor) -> list[dict[str, Any]]:
    """Norm of the gradient of the last position's loss with respect to earlier states: ids `[B, WARM + n + 1]`."""
    state = tuple(part.clone().requires_grad_() for part in one.start(len(ids)))
    states, logits = [], torch.empty(0)
    with torch.enable_grad():
        for column in ids[:, :-1].unbind(1):
            logits, state = one.step(column, state)
            state = tuple(part.view_as(part) for part in state)  # apart from what the same position makes of it
            states.append(state)
        loss = F.cross_entropy(logits, ids[:, -1], reduction="sum")
    found = []
    for n in distances(len(states) - WARM):
        grads = torch.autograd.grad(loss, states[-1 - n], retain_graph=True, allow_unused=True)
        found.append(_point(n, _norm([part for part in grads if part is not None]).log10()))
    return found


def of_tree(model: PMNetForCausalLM, ids: Tensor, generator: torch.Generator) -> dict[str, list[dict[str, Any]]]:
    """Reverse-mode curves, one sequence of `[B, WARM + n + 1]` ids at a time: the graph of a row is large."""
    found: dict[str, list[Tensor]] = {}
    ends = [0, *distances(ids.shape[1] - WARM - 1)]
    for row in ids.split(1):
        logits, levels = read_levels(model, row[:, :-1])
        fields = [level.field for level in levels]
        loss = F.cross_entropy(logits, row[:, -1])
        for i, gradient in enumerate(torch.autograd.grad(loss, fields, retain_graph=True)):
            norms = levels[i].to_states(gradient)[0].double().flatten(1).norm(dim=1)
            found.setdefault(f"loss: level {i}", []).append(_before(norms, levels[i].groups[0], ends))
        for i, level in enumerate(levels):
            end = level.final()
            along = torch.randn(end.shape, generator=generator)
            own, root = torch.autograd.grad((end * along).sum(), [level.field, fields[0]], retain_graph=True)
            lengths = along[0, level.groups[0]].double().flatten(1).norm(dim=1)
            norms = level.to_states(own)[0].double().flatten(1).norm(dim=1) / lengths
            found.setdefault(f"state: level {i}", []).append(_before(norms, level.groups[0], ends))
            if i == len(levels) - 1 > 0:
                norms = levels[0].to_states(root)[0].double().flatten(1).norm(dim=1) / along.double().norm()
                found.setdefault("hand-down", []).append(_before(norms, levels[0].groups[0], ends))
    return {name: [_point(n, torch.stack(rows)[:, i].log10()) for i, n in enumerate(ends)]
            for name, rows in found.items()}  # fmt: skip


def _before(values: Tensor, groups: Tensor, ends: Sequence[int]) -> Tensor:
    """What holds n positions before the last one for the group that it visits.

    values and groups are `[T]`; a group's value stays what it was at the latest visit. 0 where there was none.
    """
    visits = (groups == groups[-1]).nonzero().flatten()
    index = torch.searchsorted(visits, torch.tensor([len(groups) - 1 - n for n in ends]), right=True) - 1
    return torch.where(index < 0, 0, values[visits[index.clamp(min=0)]])


def _point(n: int, logarithms: Tensor) -> dict[str, Any]:
    """Median and range over rows `[B]`; None stands for the logarithm of 0."""
    ordered = sorted(logarithms.tolist())
    values = {"median": median(ordered), "low": ordered[0], "high": ordered[-1]}
    return {"n": n, **{name: value if math.isfinite(value) else None for name, value in values.items()}}
