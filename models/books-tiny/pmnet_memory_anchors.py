"""Anchors: what every slot is addressed by, learned and then fixed (docs/model.md, the tree)."""

import torch
from torch import Tensor, nn


class Anchors(nn.ParameterList):
    """One anchor tensor per level, radians `[G, N, M]`; called, so that hooks which load weights see it."""

    __call__ = nn.Module.__call__  # `ParameterList` forbids calls

    def forward(self, level: int) -> Tensor:
        """The anchors of `level`."""
        return self[level]

    @torch.no_grad()
    def graft(self, tree: "Anchors") -> None:
        """Take the anchors of a tree with fewer slots to a group, each to the same branch; the others stay as they are.

        Raises:
            ValueError: if the other tree has other levels, more slots or other phases.
        """
        for level, (to, anchors) in enumerate(zip(self, tree, strict=True)):
            slots, phases = anchors.shape[1:]
            if slots > to.shape[1] or phases != to.shape[2]:
                raise ValueError(f"anchors {list(anchors.shape)} do not fit into {list(to.shape)}")
            branches = (slice(slots),) * (level + 1)  # a group is a path: one slot of every level above
            to.view(*[to.shape[1]] * (level + 1), phases)[branches] = anchors.view(*[slots] * (level + 1), phases)
