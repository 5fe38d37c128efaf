"""Steps, counted, and the same calls on the general path."""

from contextlib import contextmanager

import pytest
import torch

import pmnet
from tests.conftest import SHAPES, random_ids, small_model

MODELS = {shape: small_model(shape) for shape in SHAPES}


class Counted:
    """The native library, counting steps."""

    def __init__(self, kernels):
        self.kernels, self.count = kernels, 0

    def step(self, *arguments):
        self.count += 1
        self.kernels.step(*arguments)


@contextmanager
def general_path():
    """Read without native steps, with the same native operators."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pmnet.model.modeling.try_step", lambda *_: None)
        yield


def both(model, ids, cache, twin, **arguments):
    """Logits of one call on `cache`, after comparing with the general path on `twin`."""
    with torch.no_grad():
        got = model(ids, past_key_values=cache, **arguments)
        with general_path():
            expected = model(ids, past_key_values=twin, **arguments)
    assert torch.equal(got.logits, expected.logits)
    return got


def prefilled(model, batch, columns=12):
    """A state whose rows are at different places: row b starts with 4 * b columns of padding."""
    mask = torch.arange(columns).expand(batch, -1) >= 4 * torch.arange(batch).unsqueeze(1)
    cache = pmnet.PMNetCache(model.config, batch)
    with torch.no_grad(), general_path():
        model(random_ids(batch, columns), attention_mask=mask.long(), past_key_values=cache)
    return cache
