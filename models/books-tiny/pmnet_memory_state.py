"""What persists: one int32 tensor of turns per level, of constant size whatever the context.

`memory[l]` is `[B, G, N, M]`: B sequences, G = N**l groups, N slots, M phases. Angle 0 everywhere is empty.
"""

import torch
from torch import Tensor

from .pmnet_config import PMNetConfig


def empty_memory(config: PMNetConfig, batch_size: int, device: torch.device | str | None = None) -> list[Tensor]:
    """The memory before the first byte: int32 turns, all zero, one `[B, G, N, M]` tensor per level."""
    return [
        torch.zeros(batch_size, *config.memory_shape(level), dtype=torch.int32, device=device)
        for level in range(config.num_levels)
    ]
