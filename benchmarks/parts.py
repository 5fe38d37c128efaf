"""The memory's two inner parts, each beside its published form: the phase scan and the read.

Shapes: B, T, G groups, C phases of a group (N slots times M), D hidden size, N slots, M phases.
"""

import math

import torch
from torch import Tensor

from benchmarks.harness import Entry, Run
from benchmarks.published import Read, global_scan
from pmnet import PMNetConfig, PMNetForCausalLM
from pmnet.ops import phase_scan
from pmnet.report.flops import parts


def scan_entries(config: PMNetConfig, batch: int, device: torch.device) -> list[Entry]:
    """Rotations of random positions over the groups of the last level, summed per group.

    Ours takes and gives int32 turns; the published form takes and gives float32 radians. Either reads the rotations and
    the state before, and writes the state after every position and at the end.
    """
    groups = config.groups_of(config.num_levels - 1)
    slots, size = config.num_memory, config.memory_size
    generator = torch.Generator().manual_seed(0)

    def visits(length: int) -> Tensor:
        return torch.randint(groups, (batch, length), generator=generator).to(device)

    def ours(length: int) -> Run:
        turns = torch.randint(-(2**31), 2**31, (batch, length, slots * size), dtype=torch.int32, device=device)
        segments, before = visits(length), torch.zeros(batch, groups, slots * size, dtype=torch.int32, device=device)
        return lambda: phase_scan(turns, segments, before)

    def published(length: int) -> Run:
        angles = math.pi * (2 * torch.rand(batch, length, slots, size, device=device) - 1)
        segments, before = visits(length), torch.zeros(batch, groups, slots, size, device=device)
        return lambda: global_scan(angles, segments, groups, before, False)

    def needs(length: int) -> float:
        return 2 * batch * (length + groups) * slots * size * 4

    return [
        Entry("ours", ours, needs, {"remark": "int32 turns in and out"}),
        Entry("published", published, needs, {"remark": "float32 radians in and out"}),
    ]


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
