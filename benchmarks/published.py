"""The published formulation, eager: what every speed and memory figure is measured against.

Written from the description of arXiv 2605.13370 and of the released model: phases are float32 radians, the memory of a
whole batch is one global cumulative sum over positions sorted by (row, group), from which each segment subtracts what
stood before it; values are projected slot by slot; attention masks are T x T. Parameter names are those of
`pmnet.PMNetForCausalLM`, so that weights load across, and `tests/test_benchmarks.py` checks that logits agree.

The state that decoding carries, keys and values of the window and one float tensor per level, is this project's
addition: the released model cannot decode with memory at all.

Shapes: B, T, D hidden size, H heads, E head_dim, W window, N slots, M phases, R read heads, G groups of a level.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pmnet import PMNetConfig

TURN = 2 * math.pi


@dataclass
class State:
    """What decoding carries: keys and values per layer, and phases in radians `[B, G, N, M]` per level."""

    window: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    memory: list[Tensor] = field(default_factory=list)
    position: int = 0


class Norm(nn.RMSNorm):
    """RMSNorm in the dtype of its weight, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`."""
        return super().forward(x.to(self.weight.dtype))


class Attention(nn.Module):
    """Sliding-window attention with a mask over all pairs of positions."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.config = config
        heads, kv_heads, width = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, heads * width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads * width, bias=False)
        self.o_proj = nn.Linear(heads * width, config.hidden_size, bias=False)
        self.q_norm = Norm(width, eps=config.rms_norm_eps)
        self.k_norm = Norm(width, eps=config.rms_norm_eps)

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor] | None
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """`[B, T, D]` to `[B, T, D]`, and the last `W - 1` keys and values, `[B, H, W - 1, E]`."""
        shape = (*x.shape[:2], -1, self.config.head_dim)
        query = _rotate(self.q_norm(self.q_proj(x).view(shape)).transpose(1, 2), *rotary)
        key = _rotate(self.k_norm(self.k_proj(x).view(shape)).transpose(1, 2), *rotary)
        value = self.v_proj(x).view(shape).transpose(1, 2)
        query, key = query.to(value.dtype), key.to(value.dtype)
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)
        keep = self.config.sliding_window - 1
        after = (key[:, :, max(0, key.shape[2] - keep) :], value[:, :, max(0, value.shape[2] - keep) :])
        return self.o_proj(y.transpose(1, 2).flatten(2)), after


class Write(nn.Module):
    """Rotate the slots of the visited group."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        size = config.memory_size
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.proj_q = nn.Linear(config.hidden_size, size)
        self.proj_k = nn.Linear(2 * size, size)
        self.proj_v = nn.Linear(config.hidden_size, size)
        self.proj_out = nn.Linear(size, size)

    def forward(
        self, x: Tensor, groups: Tensor, above: Tensor, anchors: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The visited state after each write `[B, T, N, M]`, the child group `[B, T]`, the memory after."""
        h, phi = self.norm(x), above + anchors[groups]
        query = math.pi * torch.tanh(self.proj_q(h)).unsqueeze(2)
        keys = math.pi * torch.tanh(self.proj_k(torch.cat([phi.sin(), phi.cos()], -1)))
        p = ((query - keys).cos().sum(-1) / math.sqrt(keys.shape[-1])).softmax(-1)
        theta = math.pi * torch.tanh(self.proj_out(self.proj_v(h)))
        delta = p.unsqueeze(-1) * theta.unsqueeze(2)
        state, after = global_scan(delta, groups, anchors.shape[0], memory, self.training)
        return state, keys.shape[2] * groups + p.argmax(-1), after


class Read(nn.Module):
    """Multi-head phase attention over the slots, values projected slot by slot."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.heads, self.size = config.num_memory_read_heads, config.memory_size
        width = self.heads * self.size
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.proj_q = nn.Linear(config.hidden_size, width)
        self.proj_kv = nn.Linear(2 * self.size, 2 * width)
        self.proj_out = nn.Linear(width, config.hidden_size)

    def forward(self, x: Tensor, phi: Tensor) -> Tensor:
        """`[B, T, D]` and the phase field `[B, T, N, M]` to `[B, T, D]`."""
        heads = (self.heads, self.size)
        query = math.pi * torch.tanh(self.proj_q(self.norm(x))).unflatten(-1, heads).unsqueeze(2)
        keys, values = self.proj_kv(torch.cat([phi.sin(), phi.cos()], -1)).chunk(2, -1)
        keys = math.pi * torch.tanh(keys.unflatten(-1, heads))
        weights = ((query - keys).cos().sum(-1) / math.sqrt(self.size)).softmax(2)
        return self.proj_out((weights.unsqueeze(-1) * values.unflatten(-1, heads)).sum(2).flatten(2))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, T, D]` to `[B, T, D]`."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """One decoder layer."""

    def __init__(self, config: PMNetConfig, index: int):
        super().__init__()
        self.input_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.memory_write_module = Write(config) if config.writes(index) else None
        self.memory_read_module = Read(config)
        self.post_attention_layernorm = Norm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = MLP(config)


class Stack(nn.Module):
    """Embedding, anchors, layers, final norm."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.memory_embeddings = nn.ParameterList(
            nn.Parameter(config.anchor_initializer_range * torch.randn(config.memory_shape(level)))
            for level in range(config.num_levels)
        )
        self.layers = nn.ModuleList(Layer(config, i) for i in range(config.num_hidden_layers))
        self.norm = Norm(config.hidden_size, eps=config.rms_norm_eps)


class Published(nn.Module):
    """The whole model: ids `[B, T]` to logits `[B, T, V]`."""

    def __init__(self, config: PMNetConfig):
        super().__init__()
        self.config = config
        self.model = Stack(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.lm_head.weight = self.model.embed_tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=config.initializer_range)

    def forward(self, ids: Tensor, state: State | None = None) -> Tensor:
        """Logits; `state`, if given, is continued and advanced."""
        config, x = self.config, self.model.embed_tokens(ids)
        start, kept = (0, 0) if state is None else (state.position, min(state.position, config.sliding_window - 1))
        positions = torch.arange(start, start + ids.shape[1], device=ids.device)
        rotary = _rotary(config, positions)
        seen = torch.arange(start - kept, start + ids.shape[1], device=ids.device)
        distance = positions.unsqueeze(1) - seen
        mask = (distance >= 0) & (distance < config.sliding_window)  # T x T
        groups = torch.zeros_like(ids)
        above = x.new_zeros(*ids.shape, config.num_memory, config.memory_size)
        phi, level, window, memory = above, 0, [], []
        for i, layer in enumerate(self.model.layers):
            past = state.window[i] if state is not None and state.window else None
            attended, after = layer.self_attn(layer.input_layernorm(x), rotary, mask, past)
            window.append(after)
            x = x + attended
            if layer.memory_write_module is not None:
                level = config.level_of(i)
                anchors = self.model.memory_embeddings[level]
                old = state.memory[level] if state is not None and state.memory else None
                written, child, left = layer.memory_write_module(x, groups, above, anchors, old)
                memory.append(left)
                above = above + written
                phi = above + anchors[groups]
                groups = child
            x = x + layer.memory_read_module(x, phi)
            x = x + layer.mlp(layer.post_attention_layernorm(x))
        if state is not None:
            state.window, state.memory, state.position = window, memory, start + ids.shape[1]
        return self.lm_head(self.model.norm(x))


def global_scan(
    delta: Tensor, groups: Tensor, count: int, memory: Tensor | None, training: bool
) -> tuple[Tensor, Tensor]:
    """Segments of the flattened batch as differences of one float32 cumulative sum."""
    batch, _, slots, size = delta.shape
    segments = (groups + count * torch.arange(batch, device=groups.device).unsqueeze(1)).flatten()
    lengths = torch.bincount(segments, minlength=batch * count)
    flat = delta.flatten(0, 1)
    if training and flat.requires_grad:
        scale = lengths[segments].to(flat.dtype).rsqrt().view(-1, 1, 1)
        flat = flat * scale + (flat * (1 - scale)).detach()
    order = segments.argsort(stable=True)
    total = F.pad(flat[order].cumsum(0), (0, 0, 0, 0, 1, 0))
    ends = lengths.cumsum(0)
    begins = ends - lengths
    sums = total[1:] - total[begins[segments[order]]]
    state = sums[order.argsort()]
    after = total[ends] - total[begins]
    if memory is not None:
        before = memory.flatten(0, 1)
        state, after = state + before[segments], after + before
    return (state % TURN).view_as(delta), (after % TURN).view(batch, count, slots, size)


def _rotary(config: PMNetConfig, positions: Tensor) -> tuple[Tensor, Tensor]:
    exponents = torch.arange(0, config.head_dim, 2, device=positions.device).float() / config.head_dim
    angles = positions.float().unsqueeze(1) * config.rope_theta**-exponents
    angles = torch.cat([angles, angles], -1)
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin
