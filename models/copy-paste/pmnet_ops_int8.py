"""Weight-only 8-bit integers for inference on the CPU: a quarter of the bytes that a decode step has to read.

Every output has its own scale; a product is that of the float32 weights `scale * integer`, in the same order of
summation, so the forms of a quantised model agree with each other to the bit as those of any other model do.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .pmnet_ops_backend import direct, runs_native
from .pmnet_ops_linear import Linear, row_stable_linear
from .pmnet_ops_native import kernels, pointers

_LANES = 16


class Int8Linear(nn.Module):
    """A `Linear` with its weight rounded to 8-bit integers, for inference only.

    Args:
        linear: the float32 layer to copy, `[O, K]`.
    """

    scale: Tensor
    panels: Tensor

    def __init__(self, linear: Linear):
        super().__init__()
        weight = linear.weight.detach().float()
        self.out_features, self.in_features = weight.shape
        scale = weight.abs().amax(1).clamp(min=1e-30) / 127
        rounded = (weight / scale.unsqueeze(1)).round().to(torch.int8)
        padded = nn.functional.pad(rounded, (0, 0, 0, -self.out_features % _LANES))
        # [O / 16, K, 16]: one load holds an input's weights of sixteen outputs
        self.register_buffer("panels", padded.unflatten(0, (-1, _LANES)).transpose(1, 2).contiguous())
        self.register_buffer("scale", scale)
        self.register_buffer("bias", None if linear.bias is None else linear.bias.detach().float().clone())

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Int8Linear":
        """Move to a device.

        Raises:
            ValueError: for a cast.
        """
        self.check_cast(fn)
        super()._apply(fn, recurse)
        return self

    def check_cast(self, fn: Callable[[Tensor], Tensor]) -> None:
        """ValueError if `fn` casts; the kernels read scales and biases as float32."""
        if fn(self.scale).dtype != torch.float32:
            raise ValueError("8-bit weights cannot be cast: cast the model before quantize_int8")

    @property
    def weight(self) -> Tensor:
        """The weight that is computed with, float32 `[O, K]`."""
        rounded = self.panels.transpose(1, 2).flatten(0, 1)[: self.out_features]
        return rounded.float() * self.scale.unsqueeze(1)

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., O]`."""
        bias: Any = self.bias
        if not (direct(input) and runs_native(input) and input.shape[-1] == self.in_features):
            return row_stable_linear(input, self.weight, bias)
        rows = input.reshape(-1, self.in_features).contiguous()
        out = rows.new_empty(rows.shape[0], self.out_features)
        kernels().linear(
            rows.data_ptr(), self.in_features, *pointers(self.panels, self.scale, bias, out), self.out_features,
            rows.shape[0], self.in_features, self.out_features,
        )  # fmt: skip
        return out.view(*input.shape[:-1], self.out_features)


def quantize_int8(model: nn.Module) -> nn.Module:
    """Replace every `Linear` but the output head by an `Int8Linear`, in place.

    Embedding, head, norms and anchors stay float32. The model can no longer be trained.

    Args:
        model: a float32 model on the CPU.

    Returns:
        The same model.

    Raises:
        ValueError: if a layer is not float32 on the CPU; none is then replaced.
    """
    found = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) is Linear and name != "lm_head"
    ]
    for _, name, child in found:
        if child.weight.dtype != torch.float32 or child.weight.device.type not in ("cpu", "meta"):
            raise ValueError(f"quantize_int8 needs float32 weights on the CPU, {name} has {child.weight.dtype} "
                             f"on {child.weight.device}")  # fmt: skip
    for parent, name, child in found:
        setattr(parent, name, Int8Linear(child))
    return model.requires_grad_(False)
