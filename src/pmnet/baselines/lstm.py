"""A stack of LSTM layers between a tied embedding, as a `transformers` model.

Shapes: B sequences, T positions, D hidden size, V vocabulary.
"""

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pmnet.baselines.recurrent import RecurrentForCausalLM


class LSTMConfig(PreTrainedConfig):
    """Configuration of `LSTMForCausalLM`: vocabulary, D and the number of layers."""

    model_type = "pmnet-lstm"

    vocab_size: int = 384
    hidden_size: int = 96
    num_hidden_layers: int = 2
    tie_word_embeddings: bool = True


class LSTMForCausalLM(RecurrentForCausalLM):
    """`torch.nn.LSTM` between embedding and head."""

    config_class = LSTMConfig

    def __init__(self, config: LSTMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.lstm = nn.LSTM(size, size, config.num_hidden_layers, batch_first=True)
        self.post_init()

    def run(self, x: Tensor) -> Tensor:
        """All positions from an empty state, `[B, T, D]` to `[B, T, D]`, without autocast: not every CPU can do it."""
        with torch.autocast(x.device.type, enabled=False):
            hidden: Tensor = self.lstm(x.to(self.dtype))[0]
        return hidden


AutoConfig.register(LSTMConfig.model_type, LSTMConfig)
AutoModelForCausalLM.register(LSTMConfig, LSTMForCausalLM)
