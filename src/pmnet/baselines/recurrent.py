"""What recurrent controls share: embedding, a recurrence over all positions, an output head tied to the embedding.

Shapes: B sequences, T positions, D hidden size, V vocabulary.
"""

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput


class RecurrentForCausalLM(PreTrainedModel):
    """A recurrence of D to D numbers as a byte-level language model. It keeps no state between calls: no `generate`.

    A subclass makes its modules and calls `post_init`.

    Args:
        config: with `vocab_size` and `hidden_size`.
    """

    _tied_weights_keys = {"lm_head.weight": "embed_tokens.weight"}

    def __init__(self, config: PreTrainedConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @abstractmethod
    def run(self, x: Tensor) -> Tensor:
        """All positions from an empty state, `[B, T, D]` to `[B, T, D]`."""

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """PyTorch's own initialisation, but for the embedding, whose outputs are logits too."""
        if isinstance(module, nn.Embedding):
            module.weight.normal_(std=module.embedding_dim**-0.5)
        elif isinstance(module, nn.LSTM | nn.LSTMCell | nn.Linear):
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
            raise ValueError(f"{type(self).__name__} supports neither padding nor a cache")
        return CausalLMOutput(logits=self.lm_head(self.run(self.embed_tokens(input_ids))[:, -logits_to_keep:]))
