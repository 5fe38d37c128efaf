"""Read: what a position learns from the slots of its group (docs/model.md, read).

Shapes: B, T, D hidden size, N slots, M phases, R read heads.
"""

import torch
from torch import Tensor, nn

from pmnet.config import PMNetConfig
from pmnet.ops import Int8Linear, Linear, RMSNorm, address, read_slots
from pmnet.ops.backend import plain
from pmnet.ops.linear import wrapped


class MemoryRead(nn.Module):
    """Multi-head phase attention over the N slots of the visited group."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.heads, self.size = config.num_memory_read_heads, config.memory_size
        width = self.heads * self.size
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.proj_q = Linear(config.hidden_size, width)
        self.proj_kv = Linear(2 * self.size, 2 * width)
        self.proj_out = Linear(width, config.hidden_size)

    def forward(self, hidden: Tensor, geometry: Tensor) -> Tensor:
        """Read for every position: hidden `[B, T, D]`, geometry `[B, T, N, 2M]`, result `[B, T, D]`."""
        query = self.proj_q(self.norm(hidden)).unflatten(-1, (self.heads, self.size))
        return self.proj_out(self.seen(query, geometry))

    def seen(self, query: Tensor, geometry: Tensor) -> Tensor:
        """What the heads see, `[B, T, R * M]`; a `proj_kv` with hooks, an adapter or a quantised weight is called."""
        if type(self.proj_kv) in (Linear, Int8Linear) and plain(self.proj_kv):
            weight = self.proj_kv.weight
            if not wrapped(weight):
                return read_slots(query, geometry, weight, self.proj_kv.bias)
        keys, values = self.proj_kv(geometry).unflatten(-1, (2, self.heads, self.size)).unbind(-3)
        return torch.einsum("btnr,btnrm->btrm", address(query, keys).to(values.dtype), values).flatten(2)
