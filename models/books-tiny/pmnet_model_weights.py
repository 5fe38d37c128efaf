"""Where the weights of a model lie, for the native step; found once, and again when anything about them has changed.

Finding them takes longer than a step of a small model does. What they were found in is compared before every use: the
modules and tensors themselves, their addresses, sizes, types and hooks.

Shapes: D hidden size, M phases.
"""

from collections.abc import Mapping
from itertools import chain
from math import prod
from operator import is_
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .pmnet_config import PMNetConfig
from .pmnet_memory import Anchors, MemoryRead, MemoryWrite
from .pmnet_model_attention import SlidingWindowAttention
from .pmnet_model_block import PMNetBlock, SwiGLU
from .pmnet_ops import Int8Linear, Linear, RMSNorm
from .pmnet_ops_backend import METHODS, plain, untouched

CONFIGURED = (  # in the order of `Model` in ops/native/step.cpp
    "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim", "sliding_window",
    "num_memory", "memory_size", "num_memory_read_heads", "phase_bits", "memory_cumsum", "num_hidden_layers",
    "memory_write_period",
)  # fmt: skip
_WATCHED = (*CONFIGURED, "rms_norm_eps")
_NUMBERS = ("eps", "scaling", "heads", "size")  # that modules keep for themselves


class _Unusual(Exception):
    """A module is not what the native code stands for."""


class _Watch:
    """Everything that addresses depend on, as it was; it keeps the tensors alive, and hence their identity."""

    def __init__(self, layers: nn.ModuleList, anchors: nn.ParameterList, norm: nn.Module):
        self.modules = [*chain.from_iterable(layer.modules() for layer in layers), anchors, norm]
        inside = [module for module in self.modules if module is not anchors]
        own = [part for module in inside for part in (module._modules, module._parameters, module._buffers)]
        # a table that was empty has nothing that a forward of the library's own uses
        self.tables: list[dict[str, Any]] = [layers._modules, anchors._parameters, *(part for part in own if part)]
        self.memory = [vars(part) for part in self.modules if isinstance(part, MemoryRead | MemoryWrite)]
        kinds = map(vars, set(map(type, self.modules)))
        self.methods = [(own, name, own[name]) for own in kinds for name in METHODS if name in own]
        self.configured = [vars(part) for part in self.modules if "config" in vars(part)]
        self.numbers = [(vars(part), name) for part in self.modules for name in _NUMBERS if name in vars(part)]
        self.objects = self._objects()
        self.tensors = [found for found in self.objects if isinstance(found, Tensor)]
        self.before = self._state()

    def unchanged(self, config: PMNetConfig, anchors: nn.ParameterList, norm: nn.Module) -> bool:
        """Whether these are the same modules and tensors, at the same addresses, without hooks."""
        if norm is not self.modules[-1] or anchors._parameters is not self.tables[1]:
            return False
        objects = self._objects()
        same = len(objects) == len(self.objects) and all(map(is_, objects, self.objects))
        return same and self._state() == self.before and self.usual(config)

    def usual(self, config: PMNetConfig) -> bool:
        """Whether all modules are called as their classes say, by the configuration of the model."""
        for own in self.memory:
            if not own.keys().isdisjoint(METHODS):  # methods that were replaced
                return False
        for of_class, name, method in self.methods:
            if of_class.get(name) is not method:
                return False
        return all(own["config"] is config for own in self.configured) and all(map(untouched, self.modules))

    def _objects(self) -> list[Any]:
        return [*chain.from_iterable(map(dict.values, self.tables))]

    def _state(self) -> list[Any]:
        tensors = self.tensors
        kinds = [tensor.dtype for tensor in tensors]
        layout = chain(map(Tensor.data_ptr, tensors), map(Tensor.numel, tensors), map(Tensor.is_contiguous, tensors))
        numbers = [own.get(name) for own, name in self.numbers]
        return [*map(type, self.modules), *layout, *kinds, *numbers]


class Weights:
    """Addresses of the weights of a model.

    Args:
        config: of the model.
        layers, anchors, norm: its parts.

    Attributes:
        layers: per layer, in the order of `Layer` in ops/native/step.cpp, three numbers for a product.
        anchors: per level.
        norm: of the final norm.

    Raises:
        _Unusual: if a part is not the library's own, not float32 on the CPU, or not as large as configured.
    """

    def __init__(self, config: PMNetConfig, layers: nn.ModuleList, anchors: nn.ParameterList, norm: nn.Module):
        values = vars(config)
        self._config, self._watch = [values[name] for name in _WATCHED], _Watch(layers, anchors, norm)
        expected = {"eps": values["rms_norm_eps"], "scaling": values["head_dim"] ** -0.5,
                    "heads": values["num_memory_read_heads"], "size": values["memory_size"]}  # fmt: skip
        other = any(own[name] != expected[name] for own, name in self._watch.numbers)
        if other or not self._watch.usual(config) or len(layers) != config.num_hidden_layers:
            raise _Unusual
        sizes = _sizes(values)
        self.layers = [_pointers_of(layer, *sizes) for layer in layers]
        _check(anchors, Anchors)
        levels = [str(level) for level in range(config.num_levels)]  # pruning gives parameters other names
        if list(anchors._parameters) != levels:
            raise _Unusual
        self.anchors = [_float(anchors._parameters[name], prod(config.memory_shape(int(name)))) for name in levels]
        _check(norm, RMSNorm)
        self.norm = _float(norm._parameters["weight"], values["hidden_size"])

    def hold(self, config: PMNetConfig, anchors: nn.ParameterList, norm: nn.Module) -> bool:
        """Whether all of it is still true."""
        values = vars(config)  # attributes of a configuration are slow
        return [values[name] for name in _WATCHED] == self._config and self._watch.unchanged(config, anchors, norm)


_known: WeakKeyDictionary[nn.ModuleList, Weights] = WeakKeyDictionary()


def weights_of(
    config: PMNetConfig, layers: nn.ModuleList, anchors: nn.ParameterList, norm: nn.Module
) -> Weights | None:
    """The addresses of a model's weights; None if one of its parts is not what the native code stands for."""
    weights = _known.get(layers)
    if weights is None or not weights.hold(config, anchors, norm):
        _known.pop(layers, None)
        try:
            weights = _known[layers] = Weights(config, layers, anchors, norm)
        except _Unusual:
            return None
    return weights


def _sizes(values: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Numbers in the weights of the norms and of the products, in the order of `_pointers_of`."""
    hidden, inner, width = values["hidden_size"], values["intermediate_size"], values["head_dim"]
    heads, kv_heads, size = values["num_attention_heads"], values["num_key_value_heads"], values["memory_size"]
    read = values["num_memory_read_heads"] * size
    return [hidden, width, width, hidden, hidden, hidden], [
        hidden * heads * width, hidden * kv_heads * width, hidden * kv_heads * width, heads * width * hidden,
        hidden * inner, hidden * inner, inner * hidden, hidden * read, 4 * size * read, read * hidden,
        hidden * size, 2 * size * size, hidden * size, size * size,
    ]  # fmt: skip


def _pointers_of(layer: nn.Module, norm_sizes: list[int], product_sizes: list[int]) -> list[int]:
    """Addresses of one layer's weights in the order of `Layer` in step.cpp; 0 for what is absent."""
    _check(layer, PMNetBlock)
    parts = layer._modules
    attention, mlp = _inside(parts["self_attn"], SlidingWindowAttention), _inside(parts["mlp"], SwiGLU)
    read = _inside(parts["memory_read_module"], MemoryRead)
    write = _inside(parts["memory_write_module"], MemoryWrite) if "memory_write_module" in parts else {}
    norms = [parts["input_layernorm"], attention["q_norm"], attention["k_norm"], parts["post_attention_layernorm"],
             read["norm"], write.get("norm")]  # fmt: skip
    products = [attention["q_proj"], attention["k_proj"], attention["v_proj"], attention["o_proj"],
                mlp["gate_proj"], mlp["up_proj"], mlp["down_proj"], read["proj_q"], read["proj_kv"], read["proj_out"],
                write.get("proj_q"), write.get("proj_k"), write.get("proj_v"), write.get("proj_out")]  # fmt: skip
    reader = parts["memory_read_module"]
    assert isinstance(reader, MemoryRead)
    if type(read["proj_kv"]) is Int8Linear and read["proj_kv"].out_features % (2 * 16 * reader.heads):
        raise _Unusual  # the values of a head would begin inside a panel
    found = []
    for norm, count in zip(norms, norm_sizes, strict=True):
        if norm is not None:
            _check(norm, RMSNorm)
        found.append(0 if norm is None else _float(norm._parameters["weight"], count))
    for product, count in zip(products, product_sizes, strict=True):
        if product is None:
            found += (0, 0, 0)
            continue
        if type(product) is Int8Linear:
            found += _int8(product, count)
            continue
        _check(product, Linear)
        weight, bias = product._parameters["weight"], product._parameters["bias"]
        address = _float(weight, count)
        assert weight is not None
        found += (address, 0, 0 if bias is None else _float(bias, weight.shape[0]))
    return found


def _int8(product: Int8Linear, count: int) -> tuple[int, int, int]:
    _check(product, Int8Linear)
    if product.out_features * product.in_features != count:
        raise _Unusual
    tensors = product._buffers  # attributes of a module are slow
    panels, bias = tensors["panels"], tensors["bias"]
    assert panels is not None
    return panels.data_ptr(), _float(tensors["scale"]), 0 if bias is None else _float(bias, product.out_features)


def _inside(module: nn.Module | None, kind: type) -> dict[str, nn.Module | None]:
    _check(module, kind)
    return {} if module is None else module._modules


def _check(module: nn.Module | None, kind: type) -> None:
    if module is None or type(module) is not kind or not plain(module):
        raise _Unusual


def _float(tensor: Tensor | None, count: int | None = None) -> int:
    if tensor is None or type(tensor) not in (Tensor, nn.Parameter):
        raise _Unusual
    if tensor.dtype != torch.float32 or not tensor.is_cpu or not tensor.is_contiguous():
        raise _Unusual
    if count is not None and tensor.numel() != count:  # a part was replaced: the configuration is no longer its size
        raise _Unusual
    return tensor.data_ptr()
