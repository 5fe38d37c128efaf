"""Anchors: what every slot is addressed by, learned and then fixed (docs/model.md, the tree)."""

from torch import Tensor, nn


class Anchors(nn.ParameterList):
    """One anchor tensor per level, radians `[G, N, M]`; called, so that hooks which load weights see it."""

    __call__ = nn.Module.__call__  # `ParameterList` forbids calls

    def forward(self, level: int) -> Tensor:
        """The anchors of `level`."""
        return self[level]
