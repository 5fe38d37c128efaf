"""One decoder layer: attention, write (first layer of a level), read, MLP, each after its own RMSNorm."""

from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .pmnet_config import PMNetConfig
from .pmnet_memory import MemoryRead, MemoryWrite, Tokens, Visit
from .pmnet_model_attention import PastKeys, SlidingWindowAttention
from .pmnet_model_window import Window
from .pmnet_ops import Linear, RMSNorm, silu_product


class SwiGLU(nn.Module):
    """`down(silu(gate(x)) * up(x))`, no biases."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(silu_product(self.gate_proj(hidden), self.up_proj(hidden)))


class PMNetBlock(GradientCheckpointingLayer):
    """Decoder layer `layer_idx`. It changes nothing outside itself: new state is returned, so it can be recomputed."""

    def __init__(self, config: PMNetConfig, layer_idx: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SlidingWindowAttention(config, layer_idx)
        self.memory_write_module = MemoryWrite(config) if config.writes(layer_idx) else None
        self.memory_read_module = MemoryRead(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self,
        hidden: Tensor,
        geometry: Tensor | None,
        below: Visit,
        anchors: Tensor,
        memory: Tensor,
        past: PastKeys | None,
        rotary: tuple[Tensor, Tensor],
        window: Window,
        tokens: Tokens,
    ) -> tuple[Tensor, Tensor | None, Visit, Tensor, PastKeys]:
        """Run the layer.

        Args:
            hidden: `[B, T, D]`.
            geometry: what the reads of this level see, `[B, T, N, 2M]`; of no use to a layer that writes, which makes
                it.
            below: visit that the next write starts from.
            anchors: of this level, radians `[G, N, M]`.
            memory: of this level, int32 turns `[B, G, N, M]`.
            past: keys and values before the chunk.
            rotary, window, tokens: the chunk's positions, what they see, padding and documents.

        Returns:
            hidden, geometry, below, memory and past, all after the chunk.
        """
        attended, past = self.self_attn(self.input_layernorm(hidden), rotary, window, past)
        hidden = hidden + attended
        if self.memory_write_module is not None:
            geometry, below, memory = self.memory_write_module(hidden, below, anchors, memory, tokens)
        hidden = hidden + self.memory_read_module(hidden, geometry)
        hidden = hidden + self.mlp(self.post_attention_layernorm(hidden))
        return hidden, geometry, below, memory, past
