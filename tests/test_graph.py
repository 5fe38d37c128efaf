"""A captured decode step. What can be captured is tested on a GPU only; what it is made of, in `test_compile.py`."""

import pytest
import torch

from pmnet import DecodeGraph
from tests.conftest import random_ids, small_model

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("training", [False, True])
def test_what_cannot_be_captured_is_said(training):
    model = small_model("deep").train(training)
    cache = model(random_ids(1, 5), use_cache=True).past_key_values
    with pytest.raises(ValueError, match="in training" if training else "in eval mode on cpu and 5 columns"):
        DecodeGraph(model, cache)


@pytest.mark.skipif(DEVICE.type == "cpu", reason="there is no GPU")
@pytest.mark.parametrize("streams", [1, 3])
@torch.no_grad()
def test_a_graph_is_the_model(streams):
    model, ids = small_model("period").to(DEVICE), random_ids(streams, 40).to(DEVICE)
    cache = model(ids[:, :20], use_cache=True).past_key_values
    graph = DecodeGraph(model, cache)
    for t in range(20, 40):
        found, expected = graph(ids[:, t : t + 1]), model(ids[:, t : t + 1], past_key_values=cache).logits
        assert (found - expected).abs().max() < 1e-4
    copied = graph.cache()
    assert copied.columns == cache.columns == 40
    for a, b in zip(copied.tensors(), cache.tensors(), strict=True):
        assert (a - b).abs().max() < (2**20 if a.dtype == torch.int32 else 1e-3)
