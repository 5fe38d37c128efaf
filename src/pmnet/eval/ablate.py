"""Taking a part of a loaded model away for a while."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from pmnet.model import PMNetForCausalLM


@contextmanager
def recurrence_off(model: PMNetForCausalLM) -> Iterator[None]:
    """The published ablation: states are single rotations, nothing accumulates."""
    before = model.config.memory_cumsum
    model.config.memory_cumsum = False
    try:
        yield
    finally:
        model.config.memory_cumsum = before


@contextmanager
def anchors_off(model: PMNetForCausalLM, levels: Iterable[int]) -> Iterator[None]:
    """All anchors of these levels are zero."""
    anchors = [model.model.memory_embeddings[level] for level in levels]
    before = [anchor.detach().clone() for anchor in anchors]
    try:
        with torch.no_grad():
            for anchor in anchors:
                anchor.zero_()
        yield
    finally:
        with torch.no_grad():
            for anchor, saved in zip(anchors, before, strict=True):
                anchor.copy_(saved)
