"""A state continued byte by byte: `pmnet.stream_bytes`."""

import itertools
import math

import pytest
import torch

from pmnet import PMNetCache
from pmnet.model.stream import stream_bytes
from tests.conftest import assert_same_state, small_model


@pytest.fixture(scope="module")
def model():
    return small_model("deep")


def test_a_stream_of_a_published_model_begins_with_its_own_bos_and_draws_no_special_ids():
    model = small_model("deep", pad_token_id=0, bos_token_id=254, eos_token_id=255)
    cache = PMNetCache(model.config)
    torch.manual_seed(0)
    drawn = b"".join(stream_bytes(model, b"ab", cache, 1500, temperature=100.0))  # nearly uniform
    assert len(set(drawn)) > 240
    assert not {0, 254, 255} & set(drawn)
    expected = PMNetCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[254, *b"ab", *drawn]]), past_key_values=expected)
    assert_same_state(cache, expected)


def test_whoever_stops_a_stream_has_a_state_of_what_was_yielded(model):
    caches, whole = [PMNetCache(model.config) for _ in range(2)], []
    for cache, count in zip(caches, (100, 3), strict=True):
        stream = stream_bytes(model, b"hello", cache, count, temperature=0.0)
        whole.append(b"".join(itertools.islice(stream, 3)))
    assert whole[0] == whole[1]
    assert_same_state(*caches)
    with pytest.raises(TypeError, match="a prompt is bytes"):
        next(stream_bytes(model, "hello", caches[0], 1))


def test_an_empty_nucleus_and_the_smallest_temperature_are_greedy(model):
    streams = (
        b"".join(stream_bytes(model, b"ab", PMNetCache(model.config), 20, temperature, top_p))
        for temperature, top_p in ((0.0, 1.0), (1.0, 0.0), (1e-45, 1.0), (1e-320, 1.0))
    )
    assert next(streams) == next(streams) == next(streams)
    for temperature in (-1.0, math.inf, 1e39, math.nan):
        with pytest.raises(ValueError, match="temperature must be finite and not negative"):
            next(stream_bytes(model, b"ab", PMNetCache(model.config), 1, temperature))


def test_a_long_prompt_is_read_in_chunks(model, monkeypatch):
    lengths, original = [], type(model).forward

    def counted(self, input_ids, *args, **kwargs):
        lengths.append(input_ids.shape[1])
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", counted)
    cache, prompt = PMNetCache(model.config), bytes(range(1, 251)) * 10
    drawn = b"".join(stream_bytes(model, prompt, cache, 2, temperature=0.0))
    assert lengths == [1024, 1024, 453, 1, 1]
    expected = PMNetCache(model.config)
    with torch.no_grad():
        model(torch.tensor([[257, *prompt, *drawn]]), past_key_values=expected)
    assert_same_state(cache, expected)


def test_scores_that_are_not_finite_are_named():
    model = small_model("deep")
    with torch.no_grad():
        model.model.norm.weight.fill_(math.inf)
    with pytest.raises(ValueError, match="not finite"):
        next(stream_bytes(model, b"a", PMNetCache(model.config), 1))
