"""The streaming state of a model: constant size, exact, and yours to move, fork, save and continue.

Shapes: B sequences, W window, K key/value heads, E head_dim; memory tensors are `[B, G, N, M]` int32 turns.
"""

import json
import os
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import Cache

from pmnet.atomic import replacing
from pmnet.config import PMNetConfig
from pmnet.memory import empty_memory
from pmnet.model.attention import PastKeys
from pmnet.model.ring import Ring

FORMAT = "pmnet-cache-1"
_COUNTERS = ("seen", "in_document", "next_position")


class PMNetCache(Cache):
    """Everything a PMNet remembers: the phase memory, the last `W - 1` keys and values, and three counters.

    Its size does not depend on how much has been read. Passing it to a model advances it in place; tensors taken from
    `memory` and the counters before may change with it, those of `window` do not. `clone()` keeps a copy.
    `pmnet.stream_bytes` and calls of the model continue it with new ids; `generate` expects those it has read as well.

    Args:
        config: the model's configuration.
        batch_size: B.
        device, dtype: of the keys and values; the memory is always int32.

    Attributes:
        memory: one int32 tensor of turns per level, `[B, N**l, N, M]`.
        seen: positions read per sequence, int64 `[B]`, padding excluded.
        in_document: positions of each sequence's current document, int64 `[B]`.
        next_position: rotary position that continues each sequence, int64 `[B]`.
        columns: positions read including padding, the same for all sequences.
    """

    def __init__(
        self,
        config: PMNetConfig,
        batch_size: int = 1,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(layers=[])
        self.memory = empty_memory(config, batch_size, device)
        shape = (batch_size, config.sliding_window - 1, config.num_key_value_heads, config.head_dim)
        kind = dtype or torch.get_default_dtype()
        self._ring: Ring | None = None
        self._window = [
            PastKeys(torch.zeros(shape, device=device, dtype=kind), torch.zeros(shape, device=device, dtype=kind))
            for _ in range(config.num_hidden_layers)
        ]
        self.seen, self.in_document, self.next_position = (
            torch.zeros(batch_size, dtype=torch.int64, device=device) for _ in _COUNTERS
        )
        self.columns = 0

    @property
    def window(self) -> list[PastKeys]:
        """Keys and values per layer, `[B, W - 1, K, E]` each."""
        return self._window if self._ring is None else self._ring.window()

    @window.setter
    def window(self, window: list[PastKeys]) -> None:
        self._window, self._ring = window, None

    def ring(self, length: int) -> Ring:
        """The window with room for `length` further positions, so that a step moves no keys."""
        if self._ring is None or self._ring.free < length:
            self._ring = Ring(self.window, length)
            self._window = []
        return self._ring

    def __repr__(self) -> str:
        return f"PMNetCache(batch_size={self.batch_size}, columns={self.columns}, nbytes={self.nbytes:,})"

    def __len__(self) -> int:
        return len(self._held())

    @property
    def batch_size(self) -> int:
        """B."""
        return self.seen.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        """Of the keys and values; the memory is int32."""
        return self._held()[0].keys.dtype

    def _held(self) -> list[PastKeys]:
        return self._window if self._ring is None else self._ring.buffers

    @property
    def nbytes(self) -> int:
        """Bytes of the state as `save` writes it, constant; a step of the native kernels keeps room for more keys."""
        return sum(tensor.nbytes for tensor in self._tensors().values())

    @property
    def is_initialized(self) -> bool:
        """True: all tensors exist from the start."""
        return True

    @property
    def is_croppable(self) -> bool:
        """False: a rotation that was added to a sum of rotations cannot be told apart again."""
        return False

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns read so far, padding included, whatever the layer."""
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: there is no maximum."""
        return -1

    def check_fits(self, config: PMNetConfig, batch_size: int) -> None:
        """Raise ValueError, naming the difference, unless this is a state of such a model and batch."""
        values = vars(config)  # attributes of a configuration are slow, and this runs before every step
        slots, size, layers = values["num_memory"], values["memory_size"], values["num_hidden_layers"]
        levels = layers // values["memory_write_period"]
        past = (batch_size, values["sliding_window"] - 1, values["num_key_value_heads"], values["head_dim"])
        window = self._window if self._ring is None else self._ring.window()[:1]
        counters = [self.seen, self.in_document, self.next_position]
        found = [tensor.shape for tensor in chain(self.memory, *window, counters)]
        memory = [(batch_size, slots**level, slots, size) for level in range(len(self.memory))]
        expected = [*memory, *[past] * 2 * len(window), *[(batch_size,)] * len(counters)]
        if found != expected:
            names = [f"memory.{level}" for level in range(len(memory))]
            names += [f"{name}.{layer}" for layer in range(len(window)) for name in ("keys", "values")]
            for name, shape, wanted in zip([*names, *_COUNTERS], found, expected, strict=True):
                if shape != wanted:
                    raise ValueError(
                        f"this state does not fit the model: {name} should be {list(wanted)}, got {list(shape)}"
                    )
        kinds = {tensor.dtype for past in self._held() for tensor in past}
        if len(kinds) > 1 or not all(kind.is_floating_point for kind in kinds):
            raise ValueError(f"keys and values of a state have one floating type, not {', '.join(map(str, kinds))}")
        for kind, integers in ((torch.int32, self.memory), (torch.int64, counters)):
            for tensor in integers:
                if tensor.dtype != kind:
                    raise ValueError(f"a state has int32 turns and int64 counters, not {tensor.dtype}")
        if (len(self.memory), len(self)) != (levels, layers):
            raise ValueError(
                f"this state does not fit the model: it has {len(self.memory)} levels and {len(self)} layers, "
                f"not {levels} and {layers}"
            )

    def replace(self, memory: list[Tensor], window: list[PastKeys], counters: Sequence[Tensor], columns: int) -> None:
        """Put another state in the place of this one: all of it or, where Ctrl-C comes in between, nothing."""
        named = dict(zip(_COUNTERS, counters, strict=True))
        if torch.compiler.is_compiling():  # Dynamo: no update of an object, no look behind `window`
            self.memory, self.window, self.columns = memory, window, columns
            for name, count in named.items():
                setattr(self, name, count)
        else:
            self.__dict__.update(named, memory=memory, _window=window, _ring=None, columns=columns)

    def reset(self) -> None:
        """Forget everything, in place."""
        self._map(torch.zeros_like)
        self.columns = 0

    def crop(self, tokens_to_remove: int) -> None:
        """Crop to empty; anything else is impossible for a state of constant size.

        Args:
            tokens_to_remove: 0 (nothing happens), or minus the number of columns read (empties the cache).

        Raises:
            ValueError: for any other count; a positive one is read as a length to keep by some versions.
        """
        if tokens_to_remove == 0:
            return
        if tokens_to_remove != -self.columns:
            raise ValueError(
                f"PMNetCache can only be cropped to empty: crop({-self.columns}), not crop({tokens_to_remove})"
            )
        self.reset()

    def detach(self) -> "PMNetCache":
        """Cut the graph of keys and values in place (the memory carries no graph); returns self."""
        self._map(Tensor.detach)
        return self

    def to(self, device: torch.device | str) -> "PMNetCache":
        """Move every tensor to `device`, in place; returns self.

        Raises:
            ValueError: for a dtype: turns and counters are integers.
        """
        if isinstance(device, torch.dtype):
            raise ValueError(f"a state moves between devices and is not cast to {device}: turns are integers")
        self._map(lambda tensor: tensor.to(device))
        return self

    def clone(self) -> "PMNetCache":
        """An independent copy: continue one prefix in several ways."""
        other = object.__new__(PMNetCache)
        other.__dict__.update(self.__dict__)
        other._map(Tensor.clone)
        return other

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row b becomes a copy of row `beam_idx[b]` (beam search)."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the given rows, int64 `[B']`, or bool `[B]`."""
        self._map(lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row `repeats` times, copies side by side."""
        self._map(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a `.safetensors` file; the file appears complete or not at all.

        Raises:
            OSError: if the file cannot be written.
        """
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._tensors().items()}
        metadata = {"format": FORMAT, "state": json.dumps({"columns": self.columns})}
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: torch.device | str = "cpu") -> "PMNetCache":
        """Read a state written by `save`.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if the file is not a complete PMNetCache.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no state file at {path}")
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise ValueError(f"{path} is not a PMNetCache file")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
                columns = json.loads(metadata["state"])["columns"]
                if type(columns) is not int:
                    raise TypeError("columns is not an integer")
            levels = sum(name.startswith("memory.") for name in tensors)
            layers = sum(name.startswith("keys.") for name in tensors)
            memory = [tensors[f"memory.{level}"] for level in range(levels)]
            window = [PastKeys(tensors[f"keys.{i}"], tensors[f"values.{i}"]) for i in range(layers)]
            counters = [tensors[name] for name in _COUNTERS]
            if not all(0 <= count < 2**62 for count in (columns, *torch.stack(counters).flatten().tolist())):
                raise ValueError(f"{path} is damaged: it cannot have read so many positions")
            if not all(past.isfinite().all() for pair in window for past in pair):
                raise ValueError(f"{path} is damaged: its keys and values are not finite")
        except (SafetensorError, KeyError, TypeError, RuntimeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path} is damaged or not a PMNetCache file: {error}") from error
        return cls._of(memory, window, counters, columns).to(device)

    def tensors(self) -> list[Tensor]:
        """The whole state: memory by level, keys and values by layer, the counters."""
        return list(self._tensors().values())

    @classmethod
    def from_tensors(cls, config: PMNetConfig, tensors: list[Tensor], columns: int) -> "PMNetCache":
        """The state that `tensors()` of a model describes; `generate` skips as many ids as `columns` were read."""
        levels, layers = config.num_levels, config.num_hidden_layers
        memory, rest = tensors[:levels], tensors[levels:]
        window = [PastKeys(*rest[2 * i : 2 * i + 2]) for i in range(layers)]
        return cls._of(memory, window, rest[2 * layers :], columns)

    @classmethod
    def _of(
        cls, memory: list[Tensor], window: list[PastKeys], counters: Sequence[Tensor], columns: int
    ) -> "PMNetCache":
        cache = object.__new__(cls)
        Cache.__init__(cache, layers=[])
        cache.replace(memory, window, counters, columns)
        return cache

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {f"memory.{level}": state for level, state in enumerate(self.memory)}
        for layer, past in enumerate(self.window):
            tensors |= {f"keys.{layer}": past.keys, f"values.{layer}": past.values}
        return tensors | {name: getattr(self, name) for name in _COUNTERS}

    def _map(self, change: Callable[[Tensor], Tensor]) -> None:
        self.memory = [change(state) for state in self.memory]
        self.window = [PastKeys(change(past.keys), change(past.values)) for past in self.window]
        for name in _COUNTERS:
            setattr(self, name, change(getattr(self, name)))
