"""The scan of Mamba-2 as matrix products, for CPUs.

`transformers` sums broadcast products in its reference form, which takes minutes where this takes seconds; everything
else of the model stays the library's, and on a GPU so does the scan.

Shapes: B sequences, T positions, H heads, P head_dim, N state size, Q positions of a chunk, C chunks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel
from transformers.models.mamba2 import modeling_mamba2


def chunk_scan(
    hidden_states: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor,
    dt_bias: Tensor,
    initial_states: Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **kwargs: Any,
) -> Tensor | tuple[Tensor, Tensor]:
    """`h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t`, `y_t = C_t h_t + D x_t`, chunk by chunk (arXiv 2405.21060).

    Args:
        hidden_states: x, `[B, T, H, P]`.
        dt: before bias and softplus, `[B, T, H]`; dt_bias `[H]`; dt_limit bounds the result.
        A, D: `[H]`.
        B, C: `[B, T, 1, N]`, shared by all heads.
        chunk_size: Q.
        initial_states: h before the first position, `[B, H, P, N]`; zeros if None.
        return_final_states: also return h after the last position.
        kwargs: `dt_softplus` (always true) and what the library's kernels take.

    Returns:
        y, `[B, T, H, P]`, and h if asked for.

    Raises:
        ValueError: if B and C have several groups.
    """
    batch, length, heads, size = hidden_states.shape
    kind, wide = hidden_states.dtype, torch.promote_types(hidden_states.dtype, torch.float32)
    hidden_states, dt, A, B, C, D = (x.to(wide) for x in (hidden_states, dt, A, B, C, D))
    if B.shape[2] != 1:
        raise ValueError(f"chunk_scan: one group of B and C is supported, got {B.shape[2]}")

    def chunks(x: Tensor) -> Tensor:
        """`[B, T, ...]` to `[B, C, Q, ...]`, zeros after the end."""
        return F.pad(x, (0, 0) * (x.dim() - 2) + (0, -length % chunk_size)).unflatten(1, (-1, chunk_size))

    step = F.softplus(dt + dt_bias).clamp(*dt_limit)
    x, decay = chunks(hidden_states * step.unsqueeze(-1)), chunks(step * A).cumsum(2)  # [B, C, Q, H, P], [B, C, Q, H]
    keys, queries = chunks(B.squeeze(2)), chunks(C.squeeze(2))  # [B, C, Q, N]
    future = torch.ones(chunk_size, chunk_size, dtype=torch.bool, device=x.device).triu(1)
    turned = decay.transpose(2, 3)
    between = (turned.unsqueeze(-1) - turned.unsqueeze(-2)).masked_fill(future, -torch.inf).exp()  # [B, C, H, Q, Q]
    inside = (between * (queries @ keys.transpose(-1, -2)).unsqueeze(2)) @ x.transpose(2, 3)
    left = (decay[:, :, -1:] - decay).exp().unsqueeze(-1)
    added = ((x * left).flatten(-2).transpose(-1, -2) @ keys).unflatten(2, (heads, size))  # [B, C, H, P, N]
    whole = decay[:, :, -1].exp()[..., None, None]
    # a copy: the library overwrites its state, which backward still needs
    state = (
        added.new_zeros(batch, heads, size, B.shape[-1])
        if initial_states is None
        else initial_states.to(wide, copy=True)
    )
    before = []
    for index in range(added.shape[1]):
        before.append(state)
        state = whole[:, index] * state + added[:, index]
    carried = (queries @ torch.stack(before, 1).flatten(2, 3).transpose(-1, -2)).unflatten(-1, (heads, size))
    output = inside.transpose(2, 3) + carried * decay.exp().unsqueeze(-1)
    output = (output.flatten(1, 2)[:, :length] + D.unsqueeze(-1) * hidden_states).to(kind)
    return (output, state) if return_final_states else output


@contextmanager
def matrix_scan(model: PreTrainedModel) -> Iterator[None]:
    """Inside, `model` uses `chunk_scan` if it is a Mamba-2 on a CPU; for any other model nothing changes."""
    if model.config.model_type != "mamba2" or model.device.type != "cpu":
        yield
        return
    before = modeling_mamba2.mamba2_chunk_scan
    modeling_mamba2.mamba2_chunk_scan = chunk_scan
    try:
        yield
    finally:
        modeling_mamba2.mamba2_chunk_scan = before
