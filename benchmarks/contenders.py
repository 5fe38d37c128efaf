"""The models that are measured: ours, the published formulation, and a Llama and a Mamba of equal parameter count.

Shapes: B sequences, T positions, V vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MambaConfig, MambaForCausalLM
from typing_extensions import override

from benchmarks.published import Published, State
from pmnet import PMNetCache, PMNetConfig, PMNetForCausalLM, quantize_int8
from pmnet.ops import Linear
from pmnet.report import flops

FLOAT_BYTES = flops.FLOAT_BYTES


class Contender(ABC):
    """A language model of bytes with the few calls that the cases time.

    Attributes:
        name: how results call it.
        module: the model.
        remark: what a reader of its figures has to know.
    """

    name: str
    module: nn.Module
    remark: str = ""

    @property
    def parameters(self) -> int:
        """Number of parameters, a tied matrix counted once."""
        return sum(p.numel() for p in self.module.parameters())

    @abstractmethod
    def logits(self, ids: Tensor) -> Tensor:
        """Logits `[B, T, V]` of ids `[B, T]`, without a state."""

    @abstractmethod
    def prefill(self, ids: Tensor) -> Any:
        """Read ids `[B, T]` into a fresh state, computing all logits on the way."""

    @abstractmethod
    def step(self, ids: Tensor, state: Any) -> Tensor:
        """Logits `[B, 1, V]` of one more byte per sequence, ids `[B, 1]`; the state advances."""

    def rewind(self, state: Any, steps: int) -> None:  # noqa: B027 (nothing to do for a state of constant size)
        """Forget the last `steps` positions, where a longer state would make the next run slower."""

    @abstractmethod
    def flops(self, length: int) -> float:
        """FLOP that a position of a sequence of `length` needs, forward, on average."""

    @abstractmethod
    def decode_bytes(self, batch: int, context: int) -> float:
        """Bytes that one decode step must read for `batch` sequences of `context` positions, float32."""

    def loss(self, ids: Tensor) -> Tensor:
        """Mean cross-entropy in nats of predicting ids `[B, T]` from those before."""
        return F.cross_entropy(self.logits(ids)[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


class PMNet(Contender):
    """Both forms compute the same function, so they need the same; the counts are those of the cheaper form."""

    config: PMNetConfig

    @override
    def flops(self, length: int) -> float:
        return flops.flops(self.config, length)

    @override
    def decode_bytes(self, batch: int, context: int) -> float:
        return flops.decode_bytes(self.config, batch)["total"]


class Ours(PMNet):
    """`pmnet.PMNetForCausalLM`."""

    name = "ours"
    module: PMNetForCausalLM

    def __init__(self, config: PMNetConfig):
        self.config, self.module = config, PMNetForCausalLM(config)

    @override
    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids, use_cache=False).logits

    @override
    def prefill(self, ids: Tensor) -> PMNetCache:
        return self.module(ids, use_cache=True).past_key_values

    @override
    def step(self, ids: Tensor, state: PMNetCache) -> Tensor:
        return self.module(ids, past_key_values=state).logits


class OursInt8(Ours):
    """Ours with `pmnet.quantize_int8`: the weights of the decoder layers as 8-bit integers."""

    name = "ours-int8"
    remark = "weights as 8-bit integers"

    def __init__(self, config: PMNetConfig):
        super().__init__(config)
        self.saved_bytes = 0
        for module in self.module.eval().modules():
            if isinstance(module, Linear) and module is not self.module.lm_head:
                self.saved_bytes += 3 * module.weight.numel() - FLOAT_BYTES * module.out_features  # scales come on top
        quantize_int8(self.module)

    @property
    @override
    def parameters(self) -> int:
        return flops.parameters(self.config)

    @override
    def decode_bytes(self, batch: int, context: int) -> float:
        return super().decode_bytes(batch, context) - self.saved_bytes


class OursCheckpointed(Ours):
    """Ours with gradient checkpointing: of a layer only what comes in is kept for the backward pass."""

    name = "ours-checkpointed"
    remark = "activations are computed again in the backward pass"

    def __init__(self, config: PMNetConfig):
        super().__init__(config)
        self.module.gradient_checkpointing_enable()


class PublishedForm(PMNet):
    """The published formulation, eager."""

    name = "published"

    def __init__(self, config: PMNetConfig):
        self.config, self.module = config, Published(config)

    @override
    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids)

    @override
    def prefill(self, ids: Tensor) -> State:
        state = State()
        self.module(ids, state)
        return state

    @override
    def step(self, ids: Tensor, state: State) -> Tensor:
        return self.module(ids, state)


class Llama(Contender):
    """A Llama with full attention: layers and head width of the PMNet, width for an MLP of about 8/3."""

    name = "llama"
    remark = "full attention, a cache that grows"

    def __init__(self, config: PMNetConfig):
        self.llama = llama_config(config)
        self.module = LlamaForCausalLM(self.llama)

    @override
    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids, use_cache=False).logits

    @override
    def prefill(self, ids: Tensor) -> DynamicCache:
        return self.module(ids, past_key_values=DynamicCache(config=self.llama), use_cache=True).past_key_values

    @override
    def step(self, ids: Tensor, state: DynamicCache) -> Tensor:
        return self.module(ids, past_key_values=state, use_cache=True).logits

    @override
    def rewind(self, state: DynamicCache, steps: int) -> None:
        state.crop(-steps)

    @override
    def flops(self, length: int) -> float:
        """Every weight once, and 4 FLOP per channel and key; a position sees half the keys on average."""
        return 2 * self.parameters + 4 * self.llama.num_hidden_layers * self.llama.hidden_size * (length + 1) / 2

    @override
    def decode_bytes(self, batch: int, context: int) -> float:
        """Weights once, all keys and values."""
        cache = batch * 2 * self.llama.num_hidden_layers * self.llama.hidden_size * context
        return FLOAT_BYTES * (self.parameters + cache)


class Mamba(Contender):
    """A Mamba of `transformers`, whose recurrence is a loop over positions where its GPU kernels are missing."""

    name = "mamba"
    remark = "the sequential reference scan of transformers"

    def __init__(self, config: PMNetConfig):
        self.mamba = mamba_config(config)
        self.module = MambaForCausalLM(self.mamba)

    @override
    def logits(self, ids: Tensor) -> Tensor:
        return self.module(ids, use_cache=False).logits

    @override
    def prefill(self, ids: Tensor) -> Any:
        return self.module(ids, use_cache=True).cache_params

    @override
    def step(self, ids: Tensor, state: Any) -> Tensor:
        return self.module(ids, cache_params=state, use_cache=True).logits

    @override
    def flops(self, length: int) -> float:
        """Every weight once, and 7 FLOP per state element."""
        return 2 * self.parameters + 7 * self._channels * self.mamba.state_size

    @override
    def decode_bytes(self, batch: int, context: int) -> float:
        """Weights once, the state and the inputs that the convolution keeps."""
        kept = self.mamba.state_size + self.mamba.conv_kernel
        return FLOAT_BYTES * (self.parameters + batch * self._channels * kept)

    @property
    def _channels(self) -> int:
        return self.mamba.num_hidden_layers * self.mamba.intermediate_size


CONTENDERS: dict[str, Callable[[PMNetConfig], Contender]] = {
    kind.name: kind for kind in (Ours, PublishedForm, Llama, Mamba, OursInt8, OursCheckpointed)
}


def build(config: PMNetConfig, names: list[str], device: torch.device | str = "cpu") -> list[Contender]:
    """Contenders of one size with random weights; the published form has the weights of ours.

    Args:
        config: the PMNet whose parameter count all have.
        names: keys of `CONTENDERS`; `ours` stands before `published`.
        device: where the weights live.
    """
    torch.manual_seed(0)
    models = [CONTENDERS[name](config) for name in names]
    for model in models:
        if isinstance(model, PublishedForm) and "ours" in names:
            model.module.load_state_dict(models[names.index("ours")].module.state_dict())
        model.module.to(device)
    return models


def llama_config(config: PMNetConfig) -> LlamaConfig:
    """Width from `12 width^2` weights per layer, then the MLP that makes the count equal (within half a percent)."""
    target, layers, vocabulary = flops.parameters(config), config.num_hidden_layers, config.vocab_size
    width = (math.sqrt(vocabulary**2 + 48 * layers * target) - vocabulary) / (24 * layers)
    heads = max(1, round(width / config.head_dim))
    width = heads * config.head_dim
    rest = target - width * (vocabulary + 1) - layers * (4 * width**2 + 2 * width)
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=round(rest / (3 * layers * width)),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=config.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=2**20,
        attn_implementation="sdpa",
    )


def mamba_config(config: PMNetConfig) -> MambaConfig:
    """About twice the depth, as is usual, and the width in steps of 8 with the nearest count (within a percent)."""
    target, depth = flops.parameters(config), config.num_hidden_layers
    options = [
        MambaConfig(vocab_size=config.vocab_size, hidden_size=8 * width, num_hidden_layers=layers)
        for layers in range(2 * depth - 1, 2 * depth + 2)
        for width in range(2, 200)
    ]
    return min(options, key=lambda option: abs(_mamba_parameters(option) - target))


def _mamba_parameters(config: MambaConfig) -> int:
    """Projections in, of B, C and the step, of the step's rank, and out; convolution, decay, skip; norm."""
    width, inner, states = config.hidden_size, config.intermediate_size, config.state_size
    mixer = 3 * width * inner + inner * (2 * config.time_step_rank + 2 * states + 1)
    mixer += inner * (config.conv_kernel + 1 + states + 1)
    return config.num_hidden_layers * (mixer + width) + width * (config.vocab_size + 1)
