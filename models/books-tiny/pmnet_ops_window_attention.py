"""Causal sliding-window attention in one call of a kernel (docs/model.md, a layer).

Shapes: B, T queries, H query heads, K key/value heads, E head_dim, W window.
"""

from typing import Any

import re

import torch
from torch import Tensor

from . import pmnet_ops_backend as backend
from .pmnet_ops_native import check_range, dense_like, kernels, pointers


def window_attention(query: Tensor, keys: Tensor, values: Tensor, span: Tensor, scaling: float) -> Tensor:
    """Attend to the last `span` positions, its own included; as a Triton kernel, or on the CPU, in float32.

    Args:
        query: `[B, T, H, E]`.
        keys, values: the `W - 1` positions before the first query, then those of the queries, `[B, W - 1 + T, K, E]`.
        span: how many positions a query sees, int64 in `1..W`, `[B or 1, T]`.
        scaling: factor of the scores.

    Returns:
        `[B, T, H, E]`. On the CPU, a row's bits depend on nothing but what it sees; on a GPU they also depend on how
        far it stands from the first row of the call.

    Raises:
        ValueError: if shapes or dtypes do not agree or, on the CPU, a span is not in `1..W`.
        RuntimeError: on a CPU without the native kernels.
    """
    if backend.runs_triton(query):
        from .pmnet_ops_triton import operators

        return operators.window_attention(query, keys, values, span, scaling).to(query.dtype)
    return _window_attention(query.float(), keys.float(), values.float(), span, scaling).to(query.dtype)


def check_attention(query: Tensor, keys: Tensor, values: Tensor, span: Tensor) -> None:
    """ValueError unless shapes and dtypes agree, on which a kernel relies."""
    batch, length, heads, width = query.shape
    fits = keys.shape == values.shape and keys.shape[::3] == (batch, width)
    fits = fits and keys.shape[2] > 0 and heads % keys.shape[2] == 0
    if not fits or keys.shape[1] < length or span.shape not in ((batch, length), (1, length)):
        raise ValueError(
            f"attention: query {list(query.shape)} [B, T, H, E] needs keys and values [B, W - 1 + T, K, E] and span "
            f"[B or 1, T], got {list(keys.shape)}, {list(values.shape)}, {list(span.shape)}"
        )
    if not query.dtype == keys.dtype == values.dtype or span.dtype != torch.int64:
        kinds = f"query is {query.dtype}, keys {keys.dtype}, values {values.dtype}, span {span.dtype}"
        raise ValueError(f"attention: {kinds}, but the first three must be alike and span int64")


def _sizes(query: Tensor, keys: Tensor, span: Tensor) -> tuple[int, ...]:
    batch, length, heads, width = query.shape
    return batch, length, heads, keys.shape[2], width, keys.shape[1] - length + 1, span.shape[0]


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::window_attention", mutates_args=())
def _window_attention(query: Tensor, keys: Tensor, values: Tensor, span: Tensor, scaling: float) -> Tensor:
    check_attention(query, keys, values, span)
    check_range("span - 1", span - 1, keys.shape[1] - query.shape[1] + 1)
    query, keys, values, span = query.contiguous(), keys.contiguous(), values.contiguous(), span.contiguous()
    out = torch.empty_like(query)
    kernels().window_attention(*pointers(query, keys, values, span, out), *_sizes(query, keys, span), scaling)
    return out


@torch.library.custom_op(re.sub(r"\W", lambda m: f"_{ord(m[0]):x}", __name__, flags=re.ASCII) + "::window_attention_backward", mutates_args=())
def _window_attention_backward(
    query: Tensor, keys: Tensor, values: Tensor, span: Tensor, upstream: Tensor, scaling: float
) -> tuple[Tensor, Tensor, Tensor]:
    query, keys, values, span = query.contiguous(), keys.contiguous(), values.contiguous(), span.contiguous()
    upstream = upstream.contiguous()
    grads = torch.empty_like(query), torch.zeros_like(keys), torch.zeros_like(values)
    kernels().window_attention_backward(
        *pointers(query, keys, values, span, upstream, *grads), *_sizes(query, keys, span), scaling
    )
    return grads


_window_attention.register_fake(dense_like)
_window_attention_backward.register_fake(
    lambda query, keys, values, *_: (dense_like(query), dense_like(keys), dense_like(values))
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.scaling = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
    return *_window_attention_backward(*ctx.saved_tensors, upstream, ctx.scaling), None, None


_window_attention.register_autograd(_gradient, setup_context=_save)
