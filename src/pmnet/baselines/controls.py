"""Controls for the synthetic tasks: other models with the parameters of a PMNet, to within one percent."""

import copy
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, Mamba2Config, MambaConfig, MistralConfig, PreTrainedConfig

from pmnet.baselines.lstm import LSTMConfig
from pmnet.baselines.memories import VariantConfig
from pmnet.baselines.ntm import NTMConfig
from pmnet.config import PMNetConfig


def control(name: str, like: PMNetConfig) -> PreTrainedConfig:
    """The configuration of control `name` that has as many parameters as the PMNet `like`.

    - `pmnet`: `like` itself.
    - `no-recurrence`: the same model, trained with states that are single rotations (`memory_cumsum=False`).
    - `real-memory`: the same model whose slots hold plain numbers that are added up (`memory_kind="real"`).
    - `gated-memory`: the same, and every write first forgets a part (`memory_kind="gated"`).
    - `fading-memory`: forgetting as well, and the numbers are angles, read as such (`memory_kind="fading"`).
    - `sliding-window`: a Transformer of the same layers, width and window, hence the same reach; a wider MLP.
    - `llama`: full attention, twice the layers.
    - `mamba`: the same width, as many layers as fit, a state that fills it up.
    - `mamba2`, `mamba2-3x`: twice the layers, a state as large as fits; the second with three times the parameters.
    - `flat`: the same slots in one group, all of them read by every layer (fewer parameters: one write).
    - `lstm`: two layers, as wide as fits.
    - `ntm`: a Neural Turing Machine of 128 slots of 20 numbers, its controller as wide as fits.

    Raises:
        ValueError: if there is no such control, or no size of it comes within one percent.
    """
    if name == "pmnet":
        return copy.deepcopy(like)
    if name not in CONTROLS:
        raise ValueError(f"unknown model {name!r}; there are pmnet, {', '.join(CONTROLS)}")
    return CONTROLS[name](like)


def parameters(config: PreTrainedConfig) -> int:
    """Parameters of the model that `config` describes, tied ones counted once."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def _no_recurrence(like: PMNetConfig) -> PreTrainedConfig:
    other = copy.deepcopy(like)
    other.memory_cumsum = False
    return other


def _variant(like: PMNetConfig, kind: str) -> PreTrainedConfig:
    facts = {**like.to_dict(), "model_type": VariantConfig.model_type, "memory_kind": kind}
    return VariantConfig.from_dict(facts, attn_implementation=like._attn_implementation)


def _transformer(like: PMNetConfig, layers: int, window: int | None) -> PreTrainedConfig:
    if window is not None and window < 2:
        raise ValueError(f"the library's sliding window is at least 2 keys wide, not {window}")

    def build(width: int) -> PreTrainedConfig:
        values = {
            "vocab_size": like.vocab_size, "hidden_size": like.hidden_size, "intermediate_size": width,
            "num_hidden_layers": layers, "num_attention_heads": like.num_attention_heads,
            "num_key_value_heads": like.num_key_value_heads, "head_dim": like.head_dim, "tie_word_embeddings": True,
            "initializer_range": 0.45 * like.hidden_size**-0.5, "max_position_embeddings": like.max_position_embeddings,
            "pad_token_id": like.pad_token_id, "bos_token_id": like.bos_token_id, "eos_token_id": like.eos_token_id,
            "rope_parameters": {"rope_type": "default", "rope_theta": like.rope_theta},
            "rms_norm_eps": like.rms_norm_eps,
        }  # fmt: skip
        return LlamaConfig(**values) if window is None else MistralConfig(**values, sliding_window=window)

    return _fitted(build, parameters(like), 1, 8 * like.hidden_size)


def _mamba(like: PMNetConfig) -> PreTrainedConfig:
    """As many layers as fit with a state of 16, then the state that fills it up."""

    def build(layers: int, state: int) -> PreTrainedConfig:
        return MambaConfig(
            vocab_size=like.vocab_size, hidden_size=like.hidden_size, num_hidden_layers=layers, state_size=state,
            tie_word_embeddings=True, initializer_range=0.45 * like.hidden_size**-0.5,
            pad_token_id=like.pad_token_id, bos_token_id=like.bos_token_id, eos_token_id=like.eos_token_id,
        )  # fmt: skip

    target = parameters(like)
    layers = max(n for n in range(1, 64) if parameters(build(n, 16)) <= target)
    return _fitted(lambda state: build(layers, state), target, 16, 128)


def _mamba2(like: PMNetConfig, times: int = 1) -> PreTrainedConfig:
    """The widest model that fits with a state of 64, then the state that fills it up."""

    def build(width: int, state: int) -> PreTrainedConfig:
        return Mamba2Config(
            vocab_size=like.vocab_size, hidden_size=width, num_hidden_layers=2 * like.num_hidden_layers,
            head_dim=32, num_heads=width // 16, n_groups=1, state_size=state, chunk_size=32, tie_word_embeddings=True,
            initializer_range=0.45 * width**-0.5, pad_token_id=like.pad_token_id, bos_token_id=like.bos_token_id,
            eos_token_id=like.eos_token_id,
        )  # fmt: skip

    target = times * parameters(like)
    width = max(w for w in range(16, 8 * like.hidden_size, 16) if parameters(build(w, 64)) <= target)
    return _fitted(lambda state: build(width, state), target, 64, 512)


def _flat(like: PMNetConfig) -> PreTrainedConfig:
    other = copy.deepcopy(like)
    other.memory_write_period = like.num_hidden_layers
    other.num_memory = like.num_groups * like.num_memory
    return other


def _lstm(like: PMNetConfig) -> PreTrainedConfig:
    def build(width: int) -> PreTrainedConfig:
        return LSTMConfig(vocab_size=like.vocab_size, hidden_size=width)

    return _fitted(build, parameters(like), 1, 4 * like.hidden_size)


def _ntm(like: PMNetConfig) -> PreTrainedConfig:
    def build(width: int) -> PreTrainedConfig:
        return NTMConfig(vocab_size=like.vocab_size, hidden_size=width)

    return _fitted(build, parameters(like), 1, 4 * like.hidden_size)


def _fitted(build: Callable[[int], PreTrainedConfig], target: int, low: int, high: int) -> PreTrainedConfig:
    """The configuration between `build(low)` and `build(high)` whose size comes closest to `target`."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if parameters(build(middle)) <= target else (low, middle)
    best = min((build(low), build(high)), key=lambda config: abs(parameters(config) - target))
    if abs(parameters(best) - target) > 0.01 * target:
        raise ValueError(f"no {best.model_type} has {target:,} parameters; the closest has {parameters(best):,}")
    return best


CONTROLS: dict[str, Callable[[PMNetConfig], PreTrainedConfig]] = {
    "no-recurrence": _no_recurrence,
    "real-memory": lambda like: _variant(like, "real"),
    "gated-memory": lambda like: _variant(like, "gated"),
    "fading-memory": lambda like: _variant(like, "fading"),
    "sliding-window": lambda like: _transformer(like, like.num_hidden_layers, like.sliding_window),
    "llama": lambda like: _transformer(like, 2 * like.num_hidden_layers, None),
    "mamba": _mamba,
    "mamba2": _mamba2,
    "mamba2-3x": lambda like: _mamba2(like, 3),
    "flat": _flat,
    "lstm": _lstm,
    "ntm": _ntm,
}

UNTRACED = (LSTMConfig.model_type, NTMConfig.model_type)  # which torch.compile does not take as a whole
