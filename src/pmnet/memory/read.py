"""Read: what a position learns from the slots of its group (DESIGN section 1, step 3).

Shapes: B, T, D hidden size, N slots, M phases, R read heads.
"""

import torch
from torch import Tensor, nn

from pmnet.config import PMNetConfig
from pmnet.ops import Linear, RMSNorm, read_slots, row_stable_linear


class MemoryRead(nn.Module):
    """Multi-head phase attention over the N slots of the visited group.

    Values are linear in the geometry, so slots are mixed before they are projected:
    `sum_n a_n (W_v geo_n + b_v) = W_v (sum_n a_n geo_n) + b_v`.
    """

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
        batch, length = hidden.shape[:2]
        width = self.heads * self.size
        key_weight, value_weight = self.proj_kv.weight.split(width)
        key_bias, value_bias = self.proj_kv.bias.split(width)

        query = self.proj_q(self.norm(hidden)).view(batch, length, self.heads, self.size)
        mixed = read_slots(query, geometry, key_weight, key_bias)
        values = [
            row_stable_linear(mixed[:, :, head], weight, bias)
            for head, (weight, bias) in enumerate(
                zip(value_weight.split(self.size), value_bias.split(self.size), strict=True)
            )
        ]
        return self.proj_out(torch.cat(values, dim=-1))
