"""Write: turn a position into rotations of the slots of its group, and hand the field down (docs/model.md, write).

Shapes: B, T, D hidden size, G groups of the level, N slots, M phases.
"""

from typing import NamedTuple

from torch import Tensor, nn

from .pmnet_config import PMNetConfig
from .pmnet_memory_routing import Visit, hand_down
from .pmnet_ops import Linear, RMSNorm, address, geometry, phase_write


class Tokens(NamedTuple):
    """Which positions are real and which document they belong to; None where all are alike."""

    valid: Tensor | None  # [B, T] bool, False for padding
    documents: Tensor | None  # [B, T] int64, non-decreasing; 0 continues the cached document


class MemoryWrite(nn.Module):
    """Unitary phasor update of one level (arXiv 2605.13370): `S_n <- (S_n + p_n * theta) mod 2 pi`."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.config = config
        size = config.memory_size
        self.norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.proj_q = Linear(config.hidden_size, size)
        self.proj_k = Linear(2 * size, size)
        self.proj_v = Linear(config.hidden_size, size)
        self.proj_out = Linear(size, size)

    def features(self, field: Tensor | None, anchors: Tensor, groups: Tensor) -> Tensor:
        """What keys and reads see of the slots, `[B, T, N, 2M]`: `pmnet.ops.geometry`."""
        return geometry(field, anchors, groups)

    def propose(self, hidden: Tensor, visit: Visit, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """Which slot to turn, p `[B, T, N]`, and by how much: `theta = pi * tanh(raw)`, raw `[B, T, M]`.

        Raises:
            ValueError: if the field from above was cast to half precision on its way.
        """
        if visit.field is not None and visit.field.dtype.itemsize < 4:
            raise ValueError(
                f"the angles handed from layer to layer were cast to {visit.field.dtype}; where FSDP did it, give its "
                "MixedPrecisionPolicy cast_forward_inputs=False"
            )
        normed = self.norm(hidden)
        keys = self.proj_k(self.features(visit.field, anchors, visit.groups))
        weights = address(self.proj_q(normed).unsqueeze(2), keys.unsqueeze(3)).squeeze(-1)
        return weights, self.proj_out(self.proj_v(normed))

    def forward(
        self, hidden: Tensor, visit: Visit, anchors: Tensor, memory: Tensor, tokens: Tokens
    ) -> tuple[Tensor, Visit, Tensor]:
        """Write every position and route it to its child group.

        Args:
            hidden: `[B, T, D]`.
            visit: groups of this level and the field from above.
            anchors: radians, `[G, N, M]`.
            memory: int32 turns before the first position, `[B, G, N, M]`.
            tokens: padding and documents.

        Returns:
            What this level's reads see, `[B, T, N, 2M]`, the visit to hand to the next level's write, and the memory
            after the last position.
        """
        weights, raw = self.propose(hidden, visit, anchors)
        angle, memory = phase_write(
            weights,
            raw,
            visit.groups,
            memory,
            tokens.documents,
            tokens.valid,
            phase_bits=self.config.phase_bits,
            cumulative=self.config.memory_cumsum,
            scale_gradient=self.training,
        )
        below = hand_down(visit, weights, angle)
        return self.features(below.field, anchors, visit.groups), below, memory
