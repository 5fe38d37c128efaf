"""Writes of a memory tree as autograd sees them, and their Jacobian.

Shapes: B sequences, T positions, G groups of a level, N slots, M phases.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pmnet.baselines.memories import PlainWrite, accumulate
from pmnet.memory import MemoryWrite, Tokens
from pmnet.model import PMNetCache, PMNetForCausalLM
from pmnet.ops import take_rows
from pmnet.ops.scan import scan_rotations


@dataclass(frozen=True)
class Level:
    """One level's writes.

    Attributes:
        write: the module.
        groups: visited, `[B, T]`.
        above: field handed down from above, `[B, T, N, M]`; None at the root.
        field: the same with this level's state added; part of the graph.
        decay: logarithm of what each position keeps of its group, `[B, T]`; None for a phase memory.
    """

    write: MemoryWrite
    groups: Tensor
    above: Tensor | None
    field: Tensor
    decay: Tensor | None

    def final(self) -> Tensor:
        """States of all groups after the last position, `[B, G, N, M]`; 0 where no position went. Part of the graph."""
        states = self.field if self.above is None else self.field - self.above
        count = int(self.groups.max()) + 1
        there = self.groups.unsqueeze(1) == torch.arange(count).unsqueeze(1)  # [B, G, T]
        last = torch.where(there, torch.arange(self.groups.shape[1]), -1).amax(2)
        return take_rows(states, last.clamp(min=0)) * (last >= 0)[..., None, None]

    def to_states(self, gradient: Tensor) -> Tensor:
        """From the gradient of the field to that of the state after each write, in the group that was visited.

        Both `[B, T, N, M]`. It is also the gradient of the write itself, which is added to the state.
        """
        written = torch.zeros_like(gradient).flatten(2).requires_grad_()
        count = int(self.groups.max()) + 1
        with torch.enable_grad():
            if self.decay is None:
                empty = torch.zeros(len(written), count, written.shape[2], dtype=torch.int32)
                states, _ = scan_rotations(written, self.groups, empty, None, None, 32, True, False)
            else:
                zero = written.new_zeros(len(written), count, written.shape[2])
                states, _ = accumulate(written, self.decay, self.groups, zero, Tokens(None, None), False)
        return torch.autograd.grad(states, written, gradient.flatten(2))[0].view_as(gradient)


def read_levels(model: PMNetForCausalLM, ids: Tensor) -> tuple[Tensor, list[Level]]:
    """Read `ids` `[B, T]` at once: logits of the last position `[B, V]`, and every level's writes."""
    levels: list[Level] = []

    def wrote(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        assert isinstance(module, MemoryWrite)
        hidden, visit = inputs[:2]
        decay = module.decay(hidden).detach() if isinstance(module, PlainWrite) else None
        levels.append(Level(module, visit.groups, visit.field, output[1].field, decay))

    hooks = [m.register_forward_hook(wrote) for m in model.modules() if isinstance(m, MemoryWrite)]
    try:
        with torch.enable_grad():
            logits = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    finally:
        for hook in hooks:
            hook.remove()
    return logits, levels


@torch.no_grad()
def shift_is_exact(model: PMNetForCausalLM, ids: Tensor, chunk: int = 1024) -> list[bool]:
    """Whether an integer added to the state of a level before `ids` is, to the bit, what it differs by after them.

    One answer for each level. Lower levels are addressed by the shifted state and may end elsewhere.
    """

    def read(level: int | None) -> list[Tensor]:
        cache = PMNetCache(model.config, len(ids))
        if level is not None:
            cache.memory[level] = cache.memory[level] + shifts[level]
        for part in ids.split(chunk, dim=1):
            model(part, past_key_values=cache, logits_to_keep=1)
        return cache.memory

    generator = torch.Generator().manual_seed(0)
    shapes = [model.config.memory_shape(level) for level in range(model.config.num_levels)]
    shifts = [torch.randint(-(2**31), 2**31, shape, generator=generator).int() for shape in shapes]
    plain = read(None)
    return [bool(torch.equal(read(i)[i] - plain[i], shift.expand_as(plain[i]))) for i, shift in enumerate(shifts)]
