"""A stack of LSTM layers between a tied embedding, as a `transformers` model.

Shapes: B sequences, T positions, D hidden size, V vocabulary.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class LSTMConfig(PreTrainedConfig):
    """Configuration of `LSTMForCausalLM`: vocabulary, D and the number of layers."""

    model_type = "pmnet-lstm"

    vocab_size: int = 384
    hidden_size: int = 96
    num_hidden_layers: int = 2
    tie_word_embeddings: bool = True


class LSTMForCausalLM(PreTrainedModel, GenerationMixin):
    """Embedding, `torch.nn.LSTM`, output head tied to the embedding. It keeps no state between calls."""

    config_class = LSTMConfig
    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.embed_tokens = nn.Embedding(config.vocab_size, size)
        self.lstm = nn.LSTM(size, size, config.num_hidden_layers, batch_first=True)
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, but for the embedding, whose outputs are logits too."""
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LSTM):
            module.reset_parameters()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
    ) -> CausalLMOutput:
        """Logits `[B, S, V]` of the last S = `logits_to_keep` positions (0 for all) of ids `[B, T]`.

        Raises:
            ValueError: if positions are masked or a state is given; neither is supported.
        """
        if past_key_values is not None or (attention_mask is not None and not bool(attention_mask.all())):
            raise ValueError("LSTMForCausalLM supports neither padding nor a cache")
        hidden, _ = self.lstm(self.embed_tokens(input_ids))
        return CausalLMOutput(logits=self.lm_head(hidden[:, -logits_to_keep:]))


AutoConfig.register(LSTMConfig.model_type, LSTMConfig)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM)
