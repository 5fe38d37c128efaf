"""The recurrence of each control, one position at a time, in operations that have a forward-mode derivative.

Shapes: B sequences, D width, V vocabulary.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from pmnet.baselines import LSTMForCausalLM, NTMForCausalLM, NTMState

State = tuple[Tensor, ...]


class Recurrence(NamedTuple):
    """A model as a map from state to state."""

    start: Callable[[int], State]  # the state before the first position of B sequences
    step: Callable[[Tensor, State], tuple[Tensor, State]]  # ids [B] to logits [B, V], and the state after it


def recurrence(model: PreTrainedModel) -> Recurrence:
    """The recurrence of an LSTM, a Neural Turing Machine or a Mamba.

    Raises:
        ValueError: if the model is none of them.
    """
    if isinstance(model, LSTMForCausalLM):
        return _lstm(model)
    if isinstance(model, NTMForCausalLM):
        return _ntm(model)
    if model.config.model_type == "mamba":
        return _mamba(model)
    raise ValueError(f"{type(model).__name__} is not known as a recurrence")


def _lstm(model: LSTMForCausalLM) -> Recurrence:
    layers = model.lstm.num_layers

    def start(batch: int) -> State:
        return (model.lm_head.weight.new_zeros(batch, model.config.hidden_size),) * (2 * layers)

    def step(ids: Tensor, state: State) -> tuple[Tensor, State]:
        x, after = model.embed_tokens(ids), list[Tensor]()
        for layer in range(layers):
            hidden, cell = state[2 * layer : 2 * layer + 2]
            into, back, bias_into, bias_back = model.lstm.all_weights[layer]
            gates = F.linear(x, into, bias_into) + F.linear(hidden, back, bias_back)
            enter, forget, new, leave = gates.chunk(4, -1)
            cell = forget.sigmoid() * cell + enter.sigmoid() * new.tanh()
            x = leave.sigmoid() * cell.tanh()
            after += [x, cell]
        return model.lm_head(x), tuple(after)

    return Recurrence(start, step)


def _ntm(model: NTMForCausalLM) -> Recurrence:
    def step(ids: Tensor, state: State) -> tuple[Tensor, State]:
        output, after = model.core.step(model.embed_tokens(ids), NTMState(*state))
        return model.lm_head(output), after

    return Recurrence(model.core.start, step)


def _mamba(model: Any) -> Recurrence:
    """Mamba (Gu and Dao 2023, arXiv 2312.00752): per layer the last inputs of the convolution, and the state space."""
    config, blocks = model.config, model.backbone.layers

    def start(batch: int) -> State:
        like, wide = model.lm_head.weight, config.intermediate_size
        return (
            like.new_zeros(batch, wide, config.conv_kernel - 1),
            like.new_zeros(batch, wide, config.state_size),
        ) * len(blocks)

    def step(ids: Tensor, state: State) -> tuple[Tensor, State]:
        x, after = model.backbone.embeddings(ids), list[Tensor]()
        for layer, block in enumerate(blocks):
            mixed, recent, space = _mixed(block.mixer, _normed(block.norm, x), *state[2 * layer : 2 * layer + 2])
            x = x + mixed
            after += [recent, space]
        return model.lm_head(_normed(model.backbone.norm_f, x)), tuple(after)

    return Recurrence(start, step)


def _mixed(mixer: Any, x: Tensor, recent: Tensor, space: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One layer: input `[B, D]`; output, the last inputs and the state after it."""
    inner, gate = mixer.in_proj(x).chunk(2, -1)
    window = torch.cat([recent, inner.unsqueeze(-1)], -1)
    inner = F.silu((window * mixer.conv1d.weight.squeeze(1)).sum(-1) + mixer.conv1d.bias)
    rank, size = mixer.time_step_rank, mixer.ssm_state_size
    pace, enter, leave = mixer.x_proj(inner).split([rank, size, size], -1)
    pace = F.softplus(mixer.dt_proj(pace)).unsqueeze(-1)
    space = (pace * -mixer.A_log.exp()).exp() * space + pace * enter.unsqueeze(1) * inner.unsqueeze(-1)
    seen = (space * leave.unsqueeze(1)).sum(-1) + mixer.D * inner
    return mixer.out_proj(seen * F.silu(gate)), window[..., 1:], space


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    weight, epsilon = norm.weight, norm.variance_epsilon
    assert isinstance(weight, Tensor)
    assert isinstance(epsilon, float)
    return weight * x * (x.square().mean(-1, keepdim=True) + epsilon).rsqrt()
