"""The state of a model, carried from window to window: one interface for a PMNet and for what it is compared with.

Shapes: B rows, T positions of a window, V vocabulary.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from pmnet.baselines.mamba2 import matrix_scan
from pmnet.config import PMNetConfig
from pmnet.model import PMNetCache

CARRIED = ("mistral", "mamba2")  # beside every PMNet: models whose state has constant size


class Carry:
    """B streams that a model reads window by window; gradients stop at the window's edge.

    A PMNet keeps its memory and its last keys, a sliding-window Transformer its last keys, a Mamba-2 its state.

    Args:
        model: whose state it is.
        rows: B.

    Raises:
        ValueError: if a state of this model has no constant size, or cannot be continued.
    """

    def __init__(self, model: PreTrainedModel, rows: int):
        if not carries(model.config):
            raise ValueError(f"a {model.config.model_type} has no state of constant size to carry: reset it instead")
        self.model, self.rows = model, rows
        self.reset()

    def reset(self) -> None:
        """Forget everything."""
        config = self.model.config
        self.columns = 0
        self.cache: PMNetCache | DynamicCache
        if isinstance(config, PMNetConfig):
            self.cache = PMNetCache(config, self.rows, self.model.device, self.model.dtype)
        else:
            self.cache = DynamicCache(config=config)

    def read(self, ids: Tensor, restart: Tensor | None = None, model: Callable[..., Any] | None = None) -> Tensor:
        """Logits `[B, T, V]` of the next window, int64 ids `[B, T]`.

        Args:
            ids: the window.
            restart: bool `[B]`, rows that begin a new document; their state is emptied first. (Not the last keys of
                a sliding-window Transformer, which leave by themselves.)
            model: what to call, if the model has been wrapped.
        """
        if restart is not None and (self.columns == 0 or not bool(restart.any())):
            restart = None
        logits = self._read(ids, restart, model or self.model)
        self.columns += ids.shape[1]
        return logits

    def _read(self, ids: Tensor, restart: Tensor | None, call: Callable[..., Any]) -> Tensor:
        if isinstance(self.cache, PMNetCache):
            positions = None
            if restart is not None:
                first = self.cache.next_position.masked_fill(restart, 0)
                positions = first.unsqueeze(1) + torch.arange(ids.shape[1], device=ids.device)
            logits: Tensor = call(ids, position_ids=positions, past_key_values=self.cache).logits
            self.cache.detach()
            return logits
        if self.model.config.model_type == "mamba2":
            for state in self._tensors() if restart is not None else ():
                state[restart] = 0.0
            with matrix_scan(self.model):
                logits = call(ids, use_cache=True, cache_params=self.cache).logits
            for layer in self.cache.layers:
                layer.conv_states[0] = layer.conv_states[0].detach().clone()
                layer.recurrent_states[0] = layer.recurrent_states[0].detach().clone()
            return logits
        logits = call(ids, use_cache=True, past_key_values=self.cache).logits
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys.detach().clone(), layer.values.detach().clone()
        return logits

    @property
    def nbytes(self) -> int:
        """Bytes of the state, of all rows."""
        return sum(tensor.nbytes for tensor in self._tensors())

    def state(self) -> dict[str, Tensor]:
        """Everything `restore` needs, with a row for each stream in every tensor; empty before the first window."""
        if self.columns == 0:
            return {}
        columns = torch.full((self.rows,), self.columns, device=self.model.device)
        return {"columns": columns} | {str(index): tensor for index, tensor in enumerate(self._tensors())}

    def restore(self, state: dict[str, Tensor]) -> None:
        """Continue from `state`.

        Raises:
            ValueError: if it is another model's, or of another number of rows.
        """
        self.reset()
        if not state:
            return
        if "columns" not in state:
            raise ValueError("the saved state is damaged: it lacks columns")
        with torch.no_grad(), torch.random.fork_rng():  # the library makes its layers when they are first used
            self.read(torch.zeros(self.rows, 1, dtype=torch.int64, device=self.model.device))
        self.columns = int(state["columns"][0])
        saved = [state.get(str(index)) for index in range(len(self._tensors()))]
        for index, (tensor, new) in enumerate(zip(self._tensors(), saved, strict=True)):
            grows = 2 if self.model.config.model_type == "mistral" else None  # keys: as many as have been read
            if new is None or _but(new.shape, grows) != _but(tensor.shape, grows):
                raise ValueError(f"the saved state is another model's: tensor {index} does not fit")
        self._put([new.to(self.model.device, copy=True) for new in saved if new is not None])

    def _put(self, tensors: list[Tensor]) -> None:
        """Make `tensors`, in the order of `_tensors`, the state, each in its own dtype."""
        if isinstance(self.cache, PMNetCache):
            for mine, new in zip(self.cache.tensors(), tensors, strict=True):
                mine.copy_(new)
            self.cache.columns = self.columns
            return
        for layer, first, second in zip(self.cache.layers, tensors[::2], tensors[1::2], strict=True):
            if self.model.config.model_type == "mamba2":
                layer.conv_states[0], layer.recurrent_states[0] = first, second
            else:
                layer.keys, layer.values, layer.cumulative_length = first, second, self.columns

    def _tensors(self) -> list[Tensor]:
        if isinstance(self.cache, PMNetCache):
            return self.cache.tensors()
        if self.columns == 0:
            return []
        if self.model.config.model_type == "mamba2":
            return [t for layer in self.cache.layers for t in (layer.conv_states[0], layer.recurrent_states[0])]
        return [t for layer in self.cache.layers for t in (layer.keys, layer.values)]


def carries(config: PreTrainedConfig) -> bool:
    """Whether such a model has a state of constant size that can be continued with a window of any length."""
    return isinstance(config, PMNetConfig) or config.model_type in CARRIED


def _but(shape: torch.Size, dimension: int | None) -> list[int]:
    return [size for index, size in enumerate(shape) if index != dimension]
