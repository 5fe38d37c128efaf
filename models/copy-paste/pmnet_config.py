"""Configuration of a Phasor Memory Network: every shape of the model is derived here, once.

Symbols used throughout the package:
    B batch, T positions, D hidden size, W attention window, P layers per level (write period),
    L levels, N slots per group (branching factor), M phases per slot, R read heads,
    G groups of one level (N**level).
"""

import math
from typing import Any

from transformers import PreTrainedConfig


class PMNetConfig(PreTrainedConfig):
    """Configuration of `PMNetModel` and `PMNetForCausalLM` (arXiv 2605.13370).

    The defaults are the published 118,970,368-parameter model, except for the special token ids, which
    follow `ByteTokenizer` (256 and above, so that they never collide with a byte).

    Args:
        vocab_size: number of token ids; bytes are 0-255, special tokens start at 256.
        hidden_size: D.
        intermediate_size: width of the SwiGLU MLP.
        num_hidden_layers: decoder layers, a multiple of `memory_write_period`.
        num_attention_heads, num_key_value_heads, head_dim: grouped-query attention; `head_dim` is even and
            independent of `hidden_size / num_attention_heads`.
        sliding_window: W, the number of keys a position sees, itself included.
        memory_size: M, phases per slot.
        num_memory: N, slots per group and children per group.
        num_memory_read_heads: R.
        memory_write_period: P, layers per level; the first layer of a level writes.
        memory_cumsum: False is the published "no recurrence" ablation, `S_t = delta_t`. It may be changed on a
            loaded model.
        phase_bits: b, rotations are rounded to multiples of `2**-b` turn; 32 is the published model.
        initializer_range: std of linear maps and embeddings at initialisation.
        initializer_gain: when set, a linear map is initialised with std `gain / sqrt(fan_in)` instead; 0.45 gives
            the published 0.02 where fan_in is 512.
        anchor_initializer_range: std of the anchors, in radians.
        rope_theta, rms_norm_eps, hidden_act, attention_dropout, tie_word_embeddings, max_position_embeddings:
            as in Llama-style configurations. `max_position_embeddings` limits nothing.

    Raises:
        ValueError: if the values do not describe a model; the message names the field.
    """

    model_type = "PMNet"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 384
    hidden_size: int = 512
    intermediate_size: int = 1024
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_key_value_heads: int = 12
    head_dim: int = 64
    sliding_window: int = 128
    memory_size: int = 512
    num_memory: int = 4
    num_memory_read_heads: int = 4
    memory_write_period: int = 3
    memory_cumsum: bool = True
    phase_bits: int = 32
    initializer_range: float = 0.02
    initializer_gain: float | None = None
    anchor_initializer_range: float = 0.02
    rope_theta: float = 1e6
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    attention_dropout: float = 0.0
    tie_word_embeddings: bool = True
    max_position_embeddings: int = 40960
    use_cache: bool = True
    pad_token_id: int | None = 256
    bos_token_id: int | None = 257
    eos_token_id: int | list[int] | None = 258

    def __post_init__(self, **kwargs: Any) -> None:
        if type(self).__module__.startswith("pmnet."):  # its code is this package, wherever the weights came from
            kwargs.pop("auto_map", None)
        super().__post_init__(**kwargs)
        rotary = getattr(self, "rope_parameters", None)
        if rotary:  # one place for it, whatever is set later
            self.rope_theta = rotary.get("rope_theta", self.rope_theta)
            self.rope_parameters = {name: value for name, value in rotary.items() if name != "rope_theta"}
        self.validate_architecture()

    def validate_architecture(self) -> None:
        """Reject a configuration that describes no model, with the name of the field at fault."""
        positive = (
            "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads "
            "head_dim sliding_window memory_size num_memory_read_heads memory_write_period"
        )
        for name in [*positive.split(), "num_memory", "phase_bits"]:
            value, least = getattr(self, name), 2 if name == "num_memory" else 1  # a group branches
            if type(value) is not int or value < least:
                raise ValueError(f"PMNetConfig: {name} must be a whole number, at least {least}, got {value!r}")
        if type(self.memory_cumsum) is not bool:
            raise ValueError(f"PMNetConfig: memory_cumsum must be true or false, got {self.memory_cumsum!r}")
        for name in ("initializer_range", "initializer_gain", "anchor_initializer_range", "attention_dropout"):
            value = getattr(self, name)
            most = 1.0 if name == "attention_dropout" else math.inf
            given = name != "initializer_gain" or value is not None
            if given and not (type(value) in (int, float) and 0 <= value < most):
                raise ValueError(f"PMNetConfig: {name} must be a number from 0 up (a dropout below 1), got {value!r}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"PMNetConfig: num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if self.head_dim % 2:
            raise ValueError(f"PMNetConfig: head_dim must be even for rotary positions, got {self.head_dim}")
        if self.num_hidden_layers % self.memory_write_period:
            raise ValueError(
                f"PMNetConfig: memory_write_period ({self.memory_write_period}) must divide "
                f"num_hidden_layers ({self.num_hidden_layers})"
            )
        if self.phase_bits > 32:
            raise ValueError(f"PMNetConfig: phase_bits must be between 1 and 32, got {self.phase_bits}")
        for name in ("rope_theta", "rms_norm_eps"):
            value = getattr(self, name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(f"PMNetConfig: {name} must be a positive number, got {value!r}")
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            value = getattr(self, name)
            several = value if name == "eos_token_id" and isinstance(value, list) else [value]
            if not all(found is None or type(found) is int for found in several):
                raise ValueError(f"PMNetConfig: {name} must be an id, got {value!r}")
        scaling = getattr(self, "rope_scaling", None) or getattr(self, "rope_parameters", None) or {}
        if scaling.get("rope_type", scaling.get("type", "default")) != "default":
            raise ValueError(f"PMNetConfig: rotary positions cannot be rescaled, got {scaling}")
        if self.hidden_act != "silu":
            raise ValueError(f"PMNetConfig: hidden_act must be 'silu', got {self.hidden_act!r}")
        if getattr(self, "use_sliding_window", True) is False:
            raise ValueError("PMNetConfig: use_sliding_window must be true, attention is always a sliding window")

    @property
    def num_levels(self) -> int:
        """L, the depth of the memory tree."""
        return self.num_hidden_layers // self.memory_write_period

    @property
    def num_groups(self) -> int:
        """Groups of the whole tree: 85 for N=4, L=4."""
        return sum(self.groups_of(level) for level in range(self.num_levels))

    @property
    def receptive_field(self) -> int:
        """Positions that the attention stack alone can see: `layers * (W - 1) + 1`."""
        return self.num_hidden_layers * (self.sliding_window - 1) + 1

    def level_of(self, layer: int) -> int:
        """Level of the memory tree that decoder layer `layer` works on."""
        return layer // self.memory_write_period

    def writes(self, layer: int) -> bool:
        """Whether decoder layer `layer` writes to the memory: the first layer of each level does."""
        return layer % self.memory_write_period == 0

    def groups_of(self, level: int) -> int:
        """G, the number of groups on `level`: `N**level`."""
        return self.num_memory**level

    def memory_shape(self, level: int) -> tuple[int, int, int]:
        """`[G, N, M]`, the shape of the anchors and of one sequence's state on `level`."""
        return (self.groups_of(level), self.num_memory, self.memory_size)


def pmnet_119m() -> PMNetConfig:
    """The published model: 118,970,368 parameters, 85 groups, reach 1,525 positions."""
    return PMNetConfig()


def pmnet_30m() -> PMNetConfig:
    """The smaller published variant: 29.95 M parameters."""
    return PMNetConfig(hidden_size=384, memory_size=32)
