"""The memory's two inner parts, each beside its published form: the write and the read.

Shapes: B, T, G groups, D hidden size, N slots, M phases.
"""

import math
from functools import partial

import torch
from torch import Tensor

from benchmarks.harness import Entry, Run
from benchmarks.published import Read, global_scan
from pmnet import PMNetConfig, PMNetForCausalLM
from pmnet.ops import phase_write
from pmnet.report.flops import parts


def scan_entries(config: PMNetConfig, batch: int, device: torch.device) -> list[Entry]:
    """The write of the last level from weights and raw rotations to the angles after every position.

    Either reads weights `[B, T, N]`, raw rotations `[B, T, M]` and the state before, and writes angles `[B, T, N, M]`
    and the state after. Ours sums int32 turns, the published form float32 radians.
    """
    groups = config.groups_of(config.num_levels - 1)
    slots, size = config.num_memory, config.memory_size
    generator = torch.Generator().manual_seed(0)

    def inputs(length: int) -> tuple[Tensor, Tensor, Tensor]:
        visits = torch.randint(groups, (batch, length), generator=generator)
        weights = torch.rand(batch, length, slots, generator=generator).softmax(-1)
        raw = torch.randn(batch, length, size, generator=generator)
        return weights.to(device), raw.to(device), visits.to(device)

    def ours(length: int) -> Run:
        tensors, before = inputs(length), torch.zeros(batch, groups, slots, size, dtype=torch.int32, device=device)
        return torch.no_grad()(lambda: phase_write(*tensors, before))

    def published(length: int) -> Run:
        (weights, raw, visits), before = inputs(length), torch.zeros(batch, groups, slots, size, device=device)

        def run() -> object:
            delta = weights.unsqueeze(-1) * (math.pi * torch.tanh(raw)).unsqueeze(2)
            return global_scan(delta, visits, groups, before, False)

        return torch.no_grad()(run)

    needs = partial(_scan_bytes, config, batch)
    return [Entry("ours", ours, needs), Entry("published", published, needs)]


def _scan_bytes(config: PMNetConfig, batch: int, length: int) -> float:
    slots, size = config.num_memory, config.memory_size
    groups = config.groups_of(config.num_levels - 1)
    return 4 * batch * (length * (slots + size + slots * size) + 2 * groups * slots * size)


def sorted_scan_entry(config: PMNetConfig, batch: int, device: torch.device) -> Entry:
    """The scan's two launches alone on a GPU: positions are sorted and rotations are angles already."""
    from pmnet.ops.scan import plan_segments
    from pmnet.ops.triton.scan import write_states

    groups = config.groups_of(config.num_levels - 1)
    slots, size = config.num_memory, config.memory_size

    def prepare(length: int) -> Run:
        visits = torch.randint(groups, (batch, length), device=device)
        weights = torch.rand(batch, length, slots, device=device).softmax(-1)
        angles = math.pi * torch.randn(batch, length, size, device=device).tanh()
        before = torch.zeros(batch, groups, slots * size, dtype=torch.int32, device=device)
        plan = plan_segments(visits, groups, None, None)
        return lambda: write_states(weights, angles, plan.order, plan.start, visits, before, None, None, 32)

    return Entry("ours, sorted already", prepare, partial(_scan_bytes, config, batch))


@torch.no_grad()
def read_entries(config: PMNetConfig, batch: int, device: torch.device) -> list[Entry]:
    """The first layer's read of a random phase field, sin and cos of the field included in both.

    Ours needs them once per level, not once per layer; counting them here is to the advantage of the published form
    wherever a level has several layers.
    """
    torch.manual_seed(0)
    ours = PMNetForCausalLM(config).eval().model.layers[0].memory_read_module.to(device)
    published = Read(config).to(device)
    published.load_state_dict(ours.state_dict())
    flops = sum(part.ours.flops for part in parts(config) if part.name.startswith("read"))

    def inputs(length: int) -> tuple[Tensor, Tensor]:
        field = math.pi * torch.randn(batch, length, config.num_memory, config.memory_size, device=device)
        return torch.randn(batch, length, config.hidden_size, device=device), field

    def run_ours(length: int) -> Run:
        hidden, field = inputs(length)
        return torch.no_grad()(lambda: ours(hidden, torch.cat([field.sin(), field.cos()], -1)))

    def run_published(length: int) -> Run:
        hidden, field = inputs(length)
        return torch.no_grad()(lambda: published(hidden, field))

    def needs(length: int) -> float:
        return batch * length * flops

    return [Entry("ours", run_ours, needs), Entry("published", run_published, needs)]
