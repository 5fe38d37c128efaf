"""Neural Turing Machine (Graves, Wayne and Danihelka 2014, arXiv 1410.5401): an LSTM with a tape it addresses softly.

One read head and one write head, each addressed by content and by location. What the paper leaves open is done
as reproductions found it to learn: the memory begins constant at 1e-6 (Collier and Beel 2018, arXiv 1807.08518). Both
heads begin at slot 0, the controller and the first read at zero.

Shapes: B sequences, T positions, I inputs, O outputs, H controller units, N slots, W numbers of a slot, V vocabulary.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from pmnet.baselines.recurrent import RecurrentForCausalLM

HEADS = 2  # reads, writes
START = 1e-6  # every number of the memory before the first position
_TINY = 1e-16


class NTMState(NamedTuple):
    """What a machine carries from one position to the next."""

    memory: Tensor  # [B, N, W]
    weights: Tensor  # [B, 2, N] where the read head and the write head stand; each sums to 1
    read: Tensor  # [B, W] what was read last
    hidden: Tensor  # [B, H]
    cell: Tensor  # [B, H]


class NTMCore(nn.Module):
    """The machine itself, from vectors to vectors.

    Args:
        inputs, outputs: I and O.
        hidden: H.
        slots: N.
        width: W.
    """

    def __init__(self, inputs: int, outputs: int, hidden: int = 100, slots: int = 128, width: int = 20):
        super().__init__()
        self.slots, self.width = slots, width
        self.controller = nn.LSTMCell(inputs + width, hidden)
        # of each head: key, strength, gate, three shifts, sharpness; of the write head: erase, add
        self.sizes = [HEADS * width, HEADS, HEADS, HEADS * 3, HEADS, width, width]
        self.heads = nn.Linear(hidden, sum(self.sizes))
        self.output = nn.Linear(hidden + width, outputs)

    def start(self, batch: int) -> NTMState:
        """The state before the first position, for B sequences."""
        like, hidden = self.heads.weight, self.controller.hidden_size
        weights = F.one_hot(torch.zeros(batch, HEADS, dtype=torch.int64, device=like.device), self.slots)
        memory = like.new_full((batch, self.slots, self.width), START)
        read, cell = like.new_zeros(batch, self.width), like.new_zeros(batch, hidden)
        return NTMState(memory, weights.to(like.dtype), read, cell, cell)

    def step(self, x: Tensor, state: NTMState) -> tuple[Tensor, NTMState]:
        """One position: `[B, I]` to `[B, O]`, and the state after it."""
        hidden, cell = self.controller(torch.cat([x, state.read], -1), (state.hidden, state.cell))
        key, strength, gate, shift, sharp, erase, add = self.heads(hidden).split(self.sizes, dim=-1)
        weights = self.address(
            state,
            key.unflatten(-1, (HEADS, -1)).tanh(),
            F.softplus(strength).unsqueeze(-1),
            gate.sigmoid().unsqueeze(-1),
            shift.unflatten(-1, (HEADS, 3)).softmax(-1),
            1 + F.softplus(sharp).unsqueeze(-1),
        )
        reading, writing = weights[:, :1], weights[:, 1].unsqueeze(-1)
        change = add.tanh().unsqueeze(1) - state.memory * erase.sigmoid().unsqueeze(1)  # erase, then add
        memory = torch.addcmul(state.memory, writing, change)
        read = (reading @ memory).squeeze(1)
        return self.output(torch.cat([hidden, read], -1)), NTMState(memory, weights, read, hidden, cell)

    def address(
        self, state: NTMState, key: Tensor, strength: Tensor, gate: Tensor, shift: Tensor, sharp: Tensor
    ) -> Tensor:
        """Where the heads go (section 3.3 of the paper): by content, mixed with where they were, shifted, sharpened.

        Args:
            state: before this position.
            key: `[B, 2, W]`.
            strength: at least 0, `[B, 2, 1]`.
            gate: 1 looks up by content, 0 starts from the last place, `[B, 2, 1]`.
            shift: weights of one slot forward, none, one back, `[B, 2, 3]`.
            sharp: at least 1, `[B, 2, 1]`.

        Returns:
            Weights over the slots, `[B, 2, N]`.
        """
        norms = key.norm(dim=-1, keepdim=True) * state.memory.norm(dim=-1).unsqueeze(1)
        similarity = key @ state.memory.transpose(1, 2) / (norms + _TINY)
        content = (strength * similarity).softmax(-1)
        mixed = state.weights + gate * (content - state.weights)
        forward, stay, back = shift.unbind(-1)
        turned = (
            forward.unsqueeze(-1) * mixed.roll(1, -1)
            + stay.unsqueeze(-1) * mixed
            + back.unsqueeze(-1) * mixed.roll(-1, -1)
        )
        powered = (turned + _TINY) ** sharp
        return powered / powered.sum(-1, keepdim=True)

    def forward(self, inputs: Tensor, state: NTMState | None = None) -> tuple[Tensor, NTMState]:
        """All positions in turn: `[B, T, I]` to `[B, T, O]`, and the state after the last."""
        state = self.start(inputs.shape[0]) if state is None else state
        outputs = []
        for x in inputs.unbind(1):
            output, state = self.step(x, state)
            outputs.append(output)
        return torch.stack(outputs, dim=1), state


class NTMConfig(PreTrainedConfig):
    """Configuration of `NTMForCausalLM`.

    Args:
        vocab_size: V.
        hidden_size: units of the controller, and width of the embedding.
        memory_slots, memory_width: N and W.
    """

    model_type = "pmnet-ntm"

    vocab_size: int = 384
    hidden_size: int = 100
    memory_slots: int = 128
    memory_width: int = 20
    tie_word_embeddings: bool = True


class NTMForCausalLM(RecurrentForCausalLM):
    """`NTMCore` between embedding and head."""

    config_class = NTMConfig

    def __init__(self, config: NTMConfig):
        super().__init__(config)
        size = config.hidden_size
        self.core = NTMCore(size, size, size, config.memory_slots, config.memory_width)
        self.post_init()

    def run(self, x: Tensor) -> Tensor:
        """All positions from an empty memory, `[B, T, H]` to `[B, T, H]`."""
        outputs: Tensor = self.core(x)[0]
        return outputs


AutoConfig.register(NTMConfig.model_type, NTMConfig)
AutoModelForCausalLM.register(NTMConfig, NTMForCausalLM)
