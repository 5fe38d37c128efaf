"""Row gathers with one index per batch entry."""

import torch
from torch import Tensor


def take_rows(x: Tensor, index: Tensor) -> Tensor:
    """Whole rows `x[b, index[b, i]]`.

    Args:
        x: `[B, S, ...]`, any dtype.
        index: int64 in `[0, S)`, `[B, I]`.

    Returns:
        `[B, I, ...]`; differentiable with respect to `x`.
    """
    rows = index + x.shape[1] * torch.arange(x.shape[0], device=x.device).unsqueeze(1)
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(*index.shape, *x.shape[2:])
