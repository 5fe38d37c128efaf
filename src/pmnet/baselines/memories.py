"""The same PMNet with another memory: plain numbers in the slots instead of angles, or a memory that forgets.

Shapes: B sequences, T positions, D hidden size, G groups of a level, N slots, M phases, C = N * M numbers of a group,
Q sums that are asked for.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from pmnet.config import PMNetConfig
from pmnet.memory import MemoryWrite, Tokens, Visit, hand_down
from pmnet.model import PMNetForCausalLM
from pmnet.ops import Linear, geometry, lookup, take_rows, to_angle

KINDS = ("real", "gated", "fading")
OPEN = math.log(0.98 / 0.02)  # added before the sigmoid of a gate: it begins by keeping 98 %


class VariantConfig(PMNetConfig):
    """Configuration of `VariantForCausalLM`: a `PMNetConfig` and the kind of its memory.

    Args:
        memory_kind: `real`: `S_n <- S_n + p_n * theta`; `gated`: `S_n <- a * S_n + p_n * theta` with a gate
            `a = sigmoid(w . h + b)` of each position, which acts on the group that the position visits; `fading`:
            the same, and the numbers are angles, read by sine and cosine as those of a PMNet are.

    `phase_bits` has no meaning here: nothing is rounded.

    Raises:
        ValueError: as `PMNetConfig`, and if there is no such memory.
    """

    model_type = "pmnet-variant"

    memory_kind: str = "real"

    def __post_init__(self, **kwargs: Any) -> None:
        super().__post_init__(**kwargs)
        if self.memory_kind not in KINDS:
            raise ValueError(f"VariantConfig: memory_kind must be one of {', '.join(KINDS)}, got {self.memory_kind!r}")


class PlainWrite(MemoryWrite):
    """Adds `p_n * theta` to slots of float32 numbers, which are read as `[S + e ; S + e]`; as angles if `fading`.

    The state takes the place of the int32 turns in a `PMNetCache` as its bit pattern (`Tensor.view`), so that the
    cache needs no change.
    """

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        self.gate = None if config.memory_kind == "real" else Linear(config.hidden_size, 1)

    def features(self, field: Tensor | None, anchors: Tensor, groups: Tensor) -> Tensor:
        """Sine and cosine of angles if `fading`, or else the numbers themselves, twice: `[B, T, N, 2M]`."""
        return (geometry if self.config.memory_kind == "fading" else twice)(field, anchors, groups)

    def decay(self, hidden: Tensor) -> Tensor:
        """Logarithm of what each position keeps of its group, `[B, T]`, at most 0."""
        if self.gate is None:
            return torch.zeros(hidden.shape[:2], device=hidden.device)
        return nn.functional.logsigmoid(self.gate(self.norm(hidden)).squeeze(-1).float() + OPEN)

    def forward(
        self, hidden: Tensor, visit: Visit, anchors: Tensor, memory: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Visit, Tensor]:
        """As `MemoryWrite.forward`; `memory` is the bit pattern of float32 numbers, int32 `[B, G, N, M]`."""
        weights, raw = self.propose(hidden, visit, anchors)
        written = (weights.unsqueeze(-1) * to_angle(raw).unsqueeze(2)).flatten(2)
        if self.config.memory_cumsum:
            before, decay = memory.view(torch.float32).flatten(2), self.decay(hidden)
            with torch.autocast(written.device.type, enabled=False):  # sums stay float32
                states, after = accumulate(written, decay, visit.groups, before, tokens, self.training)
            memory = after.detach().float().view_as(memory).view(torch.int32)
        else:
            states = written
        states = states.unflatten(-1, anchors.shape[1:])
        below = hand_down(visit, weights, states)
        return self.features(below.field, anchors, visit.groups), below, memory


def twice(field: Tensor | None, anchors: Tensor, groups: Tensor) -> Tensor:
    """What stands for the geometry of a slot: its numbers twice.

    Args:
        field: sum of the states from the root to here, `[B, T, N, M]`; None is zero.
        anchors: `[G, N, M]`.
        groups: int64 in `[0, G)`, `[B, T]`.

    Returns:
        `[S + e ; S + e]`, `[B, T, N, 2M]`, never half precision.
    """
    table = anchors.flatten(1)
    rows = lookup(table if table.dtype == torch.float64 else table.float(), groups)
    numbers = rows.view(*groups.shape, *anchors.shape[1:])
    numbers = numbers if field is None else field + numbers
    return torch.cat([numbers, numbers], dim=-1)


def accumulate(
    written: Tensor, decay: Tensor, groups: Tensor, before: Tensor, tokens: Tokens, scale_gradient: bool
) -> tuple[Tensor, Tensor]:
    """All states of the recurrence `S[g_t] <- exp(decay_t) * S[g_t] + written_t`, by a product with a `T x T` matrix.

    Args:
        written: `[B, T, C]`.
        decay: at most 0, `[B, T]`.
        groups: int64 in `[0, G)`, `[B, T]`.
        before: state before the first position, `[B, G, C]`.
        tokens: padding writes nothing and forgets nothing; document 0 continues `before`, later ones start from 0.
        scale_gradient: divide the gradient of `written` by the square root of its segment's length, as a PMNet does.

    Returns:
        The state of the visited group right after each position, `[B, T, C]` (meaningless at padding), and of all
        groups after the last position, `[B, G, C]`.
    """
    length, count = groups.shape[1], before.shape[1]
    documents = torch.zeros_like(groups) if tokens.documents is None else tokens.documents
    segments = groups + count * documents
    last = documents[:, -1:]
    ends = count * last + torch.arange(count, device=groups.device)
    own, members = (which.unsqueeze(2) == segments.unsqueeze(1) for which in (segments, ends))
    if tokens.valid is not None:
        own, members = (which & tokens.valid.unsqueeze(1) for which in (own, members))
    if scale_gradient:
        factor = own.sum(2, keepdim=True).clamp(min=1).to(written.dtype).rsqrt()
        written = written + (factor - 1) * (written - written.detach())  # the value stays what it is
    earlier = own & torch.ones(length, length, dtype=torch.bool, device=groups.device).tril()
    until = _kept(earlier, decay)
    states = _sums(earlier, until, until, written)
    total = _kept(members, decay)
    after = _sums(members, total, until, written)
    continued = (documents == 0).unsqueeze(-1)
    states = states + torch.where(continued, until.exp().unsqueeze(-1) * take_rows(before, groups), 0)
    return states, after + torch.where((last == 0).unsqueeze(-1), total.exp().unsqueeze(-1) * before, 0)


def _kept(members: Tensor, decay: Tensor) -> Tensor:
    """Sum of the decays of each row's members: members `[B, Q, T]`, decay `[B, T]`, result `[B, Q]`."""
    return (members.to(decay.dtype) @ decay.unsqueeze(-1)).squeeze(-1)


def _sums(members: Tensor, total: Tensor, until: Tensor, written: Tensor) -> Tensor:
    """What is left of the members' writes: members `[B, Q, T]`, total `[B, Q]`, until `[B, T]`, result `[B, Q, C]`."""
    since = total.unsqueeze(2) - until.unsqueeze(1)
    return since.masked_fill(~members, -math.inf).exp().to(written.dtype) @ written


class VariantForCausalLM(PMNetForCausalLM):
    """PMNet whose writes are `PlainWrite`; everything else, states handed between calls included, is that of PMNet."""

    config_class = VariantConfig

    def __init__(self, config: VariantConfig):
        super().__init__(config)
        for layer in self.model.layers:
            if layer.memory_write_module is not None:
                layer.memory_write_module = PlainWrite(config)
        self.post_init()


AutoConfig.register(VariantConfig.model_type, VariantConfig)
AutoModelForCausalLM.register(VariantConfig, VariantForCausalLM)
