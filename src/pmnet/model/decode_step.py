"""A decode step as a plain function of tensors, for `torch.export`.

Shapes: B rows, V vocabulary.
"""

from torch import Tensor, nn

from pmnet.model.cache import PMNetCache
from pmnet.model.modeling import PMNetForCausalLM


class DecodeStep(nn.Module):
    """Reads one position per row: the state goes in and comes out as a list of tensors, nothing changes in place.

    Args:
        model: in eval mode.
    """

    def __init__(self, model: PMNetForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Advance `state` by one position.

        Args:
            input_ids: int64 `[B, 1]`.
            state: `PMNetCache.tensors()`.

        Returns:
            Next-token logits `[B, 1, V]` and the state after the position, in the same order.
        """
        cache = PMNetCache.from_tensors(self.model.config, [tensor.clone() for tensor in state], columns=1)
        logits = self.model(input_ids, past_key_values=cache).logits
        return logits, cache.tensors()


__all__ = ["DecodeStep"]
