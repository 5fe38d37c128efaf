"""Batches whose rows end at different steps: the state that is left behind is that of each row's own text."""

import pytest
import torch

import pmnet
from pmnet import PMNetCache
from tests.conftest import random_ids, small_model

PAD = 256


@pytest.fixture(scope="module")
def model():
    return small_model("deep")


def one_ends_early(model, ids, how):
    """`generate` of two rows, of which the first ends with its second id; the ids and the state."""
    free = model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD)
    last, cache = int(free[0, ids.shape[1] + 1]), PMNetCache(model.config, 2)
    ends = {
        "end of sequence": {"eos_token_id": last},
        "returned": {"eos_token_id": last, "return_dict_in_generate": True},
        "string": {"stop_strings": [chr(last)], "tokenizer": pmnet.ByteTokenizer(), "eos_token_id": 383},
    }
    brought = {} if how == "returned" else {"past_key_values": cache}
    found = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=PAD, **brought, **ends[how])
    return (found.sequences, found.past_key_values) if how == "returned" else (found, cache)


@pytest.fixture(scope="module")
def ids(model):
    """Two prompts; what the first is continued with ends at a byte of ASCII that the second does not come by."""
    for seed in range(200):
        ids = random_ids(2, 12, seed)
        (*first, last), second = (
            row[12:].tolist()[:n]
            for row, n in zip(
                model.generate(ids, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=PAD),
                (2, 8),
                strict=True,
            )
        )
        if 32 < last < 127 and last not in first and last not in second:
            return ids
    raise AssertionError("no such prompts")


@pytest.mark.parametrize("how", ["end of sequence", "returned", "string"])
def test_pads_behind_a_row_that_ended_do_not_reach_its_state(model, ids, how):
    sequences, cache = one_ends_early(model, ids, how)
    assert sequences[0, 14:].eq(PAD).all()
    assert not sequences[1].eq(PAD).any()
    assert cache.seen.tolist() == [14, 19]
    for row, length in ((0, 14), (1, 19)):
        with torch.no_grad():
            alone = model(sequences[row : row + 1, :length]).past_key_values
        for level, whole in zip(alone.memory, cache.memory, strict=True):
            assert torch.equal(level[0], whole[row])


def test_the_next_turn_of_a_batch_is_that_without_a_state(model, ids):
    sequences, cache = one_ends_early(model, ids, "end of sequence")
    whole = torch.cat([sequences, random_ids(2, 4, seed=1)], dim=1)
    options = {"attention_mask": whole.ne(PAD).long(), "max_new_tokens": 5, "do_sample": False, "pad_token_id": PAD}
    fresh = model.generate(whole, eos_token_id=None, **options)
    assert torch.equal(model.generate(whole, past_key_values=cache, eos_token_id=None, **options), fresh)


def test_a_state_is_not_given_without_a_cache(model):
    cache = PMNetCache(model.config, 2)
    with pytest.raises(ValueError, match="use_cache=False reads everything again at every step"):
        model.generate(random_ids(2, 12), past_key_values=cache, use_cache=False, max_new_tokens=2)
    assert cache.columns == 0


def test_continuous_batching_is_refused(model):
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[1, 2, 3]])
