"""A linear map whose rows do not depend on how many rows there are.

Matrix libraries pick another summation order for few rows (a vector product) and, with several threads, for deep
and narrow products (the inner dimension is split between threads). Either would make a byte's result depend on how
the stream is cut into chunks and on its batch neighbours. At least `MIN_ROWS` rows and at most `MAX_DEPTH` summands
a product keep one order in float32 on the CPU; `tests/test_exactness.py` checks it on the machine at hand.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

MIN_ROWS = 16
MAX_DEPTH = 256


def row_stable_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, with rows that do not depend on their number (float32 and float64 on the CPU).

    Args:
        x: input `[..., K]`, any number of leading dimensions; cast to the dtype of `weight`.
        weight: `[O, K]`.
        bias: optional `[O]`.

    Returns:
        `[..., O]`. In half precision and on other devices this is `torch.nn.functional.linear`.
    """
    x = x.to(weight.dtype)
    if x.device.type != "cpu" or weight.dtype.itemsize < 4 or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    rows = x.reshape(-1, x.shape[-1])
    count = rows.shape[0]
    if count < MIN_ROWS:
        rows = F.pad(rows, (0, 0, 0, MIN_ROWS - count))
    out = F.linear(rows[:, :MAX_DEPTH], weight[:, :MAX_DEPTH], bias)
    for depth in range(MAX_DEPTH, x.shape[-1], MAX_DEPTH):
        part = slice(depth, depth + MAX_DEPTH)
        out = out + F.linear(rows[:, part], weight[:, part])
    return out[:count].view(*x.shape[:-1], weight.shape[0])


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` computed by `row_stable_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., in_features]` to `[..., out_features]`."""
        return row_stable_linear(input, self.weight, self.bias)


class RMSNorm(torch.nn.RMSNorm):
    """`torch.nn.RMSNorm` in the dtype of its weight, so that autocast does not compute it in half precision."""

    def forward(self, x: Tensor) -> Tensor:
        """`[..., D]` to `[..., D]`, in the dtype of the weight."""
        return super().forward(x.to(self.weight.dtype))
