"""`generate()` and the streaming state: what a user does with them."""

import itertools
import subprocess
import sys

import pytest
import torch
from transformers import TextIteratorStreamer

import pmnet
from pmnet import PMNetCache
from tests.conftest import assert_same_state, random_ids, small_model

QUIET = {"pad_token_id": 256, "eos_token_id": None}


@pytest.fixture(scope="module")
def model():
    return small_model("deep")


def step_by_step(model, ids, count):
    """Greedy continuation without any cache: the whole sequence through the parallel form every time."""
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids


@pytest.mark.parametrize("prompt", [1, 3, 6, 40])
def test_greedy_with_cache_equals_the_parallel_form(model, prompt):
    ids = random_ids(2, prompt)
    assert torch.equal(model.generate(ids, max_new_tokens=12, do_sample=False, **QUIET), step_by_step(model, ids, 12))
    uncached = model.generate(ids, max_new_tokens=12, do_sample=False, use_cache=False, **QUIET)
    assert torch.equal(uncached, step_by_step(model, ids, 12))


def test_left_padded_batch_equals_each_row_alone(model):
    tokenizer = pmnet.ByteTokenizer()
    texts = ["a", "The memory is a tree", "of groups."]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = model.generate(**batch, max_new_tokens=10, do_sample=False, **QUIET)
    for text, row in zip(texts, together, strict=True):
        alone = model.generate(**tokenizer([text], return_tensors="pt"), max_new_tokens=10, do_sample=False, **QUIET)
        assert torch.equal(alone[0, -10:], row[-10:])


def test_beam_search_equals_brute_force(model):
    """With as many beams as there are prefixes, beam search is exhaustive; compare with scoring every string."""
    ids, length, letters = random_ids(1, 9), 3, [65, 66, 67]
    found = model.generate(
        ids, max_new_tokens=length, num_beams=9, do_sample=False, length_penalty=1.0, early_stopping=False,
        prefix_allowed_tokens_fn=lambda batch, prefix: letters, **QUIET,
    )  # fmt: skip
    scores = {}
    with torch.no_grad():
        for string in itertools.product(letters, repeat=length):
            whole = torch.cat([ids, torch.tensor([string])], dim=1)
            logits = model(whole, use_cache=False).logits[0, 8:-1]
            masked = torch.full_like(logits, -torch.inf)
            masked[:, letters] = logits.log_softmax(-1)[:, letters]
            scores[string] = sum(masked[i, byte].item() for i, byte in enumerate(string))
    assert tuple(found[0, 9:].tolist()) == max(scores, key=scores.get)


@pytest.mark.parametrize(
    "how",
    [
        {"do_sample": True, "temperature": 0.7, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 3, "num_return_sequences": 2, "do_sample": False},
        {"num_beams": 2, "do_sample": True},
    ],
)
def test_every_way_to_decode_runs_and_is_repeatable(model, how):
    ids, results = random_ids(2, 7), []
    for _ in range(2):
        torch.manual_seed(5)
        results.append(model.generate(ids, max_new_tokens=6, **how, **QUIET))
    assert results[0].shape == (2 * how.get("num_return_sequences", 1), 13)
    assert torch.equal(results[0], results[1])


def test_streamer(model):
    tokenizer = pmnet.ByteTokenizer()
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    out = model.generate(random_ids(1, 4), max_new_tokens=8, do_sample=False, streamer=streamer, **QUIET)
    assert "".join(streamer) == tokenizer.decode(out[0, 4:])


def test_generation_continues_a_state(model):
    ids = random_ids(1, 20)
    cache = PMNetCache(model.config)
    with torch.no_grad():
        model(ids[:, :15], past_key_values=cache)
    continued = model.generate(ids, past_key_values=cache, max_new_tokens=6, do_sample=False, **QUIET)
    assert torch.equal(continued, model.generate(ids, max_new_tokens=6, do_sample=False, **QUIET))
    assert cache.columns == 25


def test_the_state_has_constant_size(model):
    cache = PMNetCache(model.config, 2)
    before = cache.nbytes
    with torch.no_grad():
        for length in (1, 100, 3):
            model(random_ids(2, length), past_key_values=cache)
            assert cache.nbytes == before
    assert [tuple(level.shape) for level in cache.memory] == [(2, 4**level, 4, 16) for level in range(3)]
    assert all(level.dtype == torch.int32 for level in cache.memory)
    assert cache.get_seq_length() == 104


def test_reorder_repeat_select_reset_crop_clone(model):
    ids, more = random_ids(3, 12), random_ids(1, 5, seed=1)
    cache = PMNetCache(model.config, 3)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        fork = cache.clone()
        expected = model(more.expand(3, -1), past_key_values=fork.clone()).logits
        fork.reorder_cache(torch.tensor([2, 0, 0]))
        assert torch.equal(model(more.expand(3, -1), past_key_values=fork).logits, expected[[2, 0, 0]])
        fork = cache.clone()
        fork.batch_repeat_interleave(2)
        assert torch.equal(model(more.expand(6, -1), past_key_values=fork).logits, expected.repeat_interleave(2, 0))
        empty = model(more.expand(3, -1)).logits
        with pytest.raises(ValueError, match="cropped to empty"):
            cache.crop(-3)
        with pytest.raises(ValueError, match="cropped to empty"):
            cache.crop(12)  # a length to keep, in transformers 5.17
        cache.crop(-12)
        assert cache.columns == 0
        assert torch.equal(model(more.expand(3, -1), past_key_values=cache).logits, empty)
        cache.reset()
        assert torch.equal(model(more.expand(3, -1), past_key_values=cache).logits, empty)


def test_the_state_moves_to_another_device(model):
    cache = PMNetCache(model.config)
    assert cache.to("meta") is cache
    assert {tensor.device.type for tensor in [*cache.memory, cache.seen, cache.window[0].keys]} == {"meta"}


def test_training_through_a_carried_state_detached(model):
    network = small_model("deep").train()
    cache = PMNetCache(network.config, 2)
    for seed in range(3):
        ids = random_ids(2, 10, seed)
        network(ids, past_key_values=cache, labels=ids).loss.backward()
        assert cache.detach() is cache
        assert not any(past.keys.requires_grad for past in cache.window)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


def test_another_process_continues_with_identical_output(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    ids, more = random_ids(2, 33), random_ids(2, 9, seed=1)
    cache = PMNetCache(model.config, 2)
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.save(tmp_path / "state.safetensors")
        expected = model(more, past_key_values=cache).logits
    torch.save({"more": more, "expected": expected}, tmp_path / "check.pt")
    program = (
        "import sys, torch, pmnet; folder = sys.argv[1]\n"
        "model = pmnet.PMNetForCausalLM.from_pretrained(folder + '/model').eval()\n"
        "cache = pmnet.PMNetCache.load(folder + '/state.safetensors')\n"
        "check = torch.load(folder + '/check.pt')\n"
        "with torch.no_grad(): logits = model(check['more'], past_key_values=cache).logits\n"
        "assert torch.equal(logits, check['expected'])\n"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True)


def test_damaged_or_foreign_states_are_named(model, tmp_path):
    path = tmp_path / "state.safetensors"
    with pytest.raises(FileNotFoundError, match="no state file"):
        pmnet.PMNetCache.load(path)
    PMNetCache(model.config).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-8])
    with pytest.raises(ValueError, match="damaged"):
        pmnet.PMNetCache.load(path)
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="not a PMNetCache"):
        pmnet.PMNetCache.load(tmp_path / "model" / "model.safetensors")
    with pytest.raises(ValueError, match="does not fit"), torch.no_grad():
        model(random_ids(1, 2), past_key_values=PMNetCache(small_model("wide").config))
    with pytest.raises(ValueError, match="does not fit"), torch.no_grad():
        model(random_ids(1, 2), past_key_values=PMNetCache(model.config, 2))


@pytest.mark.parametrize("how", [{"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}], ids=str)
def test_a_state_gets_rows_for_beams_and_several_answers(model, how):
    ids, found = random_ids(3, 9), []
    for given in ({}, {"past_key_values": PMNetCache(model.config, 3)}):
        torch.manual_seed(0)
        found.append(model.generate(ids, max_new_tokens=4, **how, **given))
    assert torch.equal(*found)


def test_a_state_that_cannot_be_written_is_named_and_leaves_nothing(model, tmp_path):
    with pytest.raises(OSError, match="nowhere"):
        PMNetCache(model.config).save(tmp_path / "nowhere" / "state.safetensors")
    (tmp_path / "folder").mkdir()
    with pytest.raises(OSError, match="folder"):
        PMNetCache(model.config).save(tmp_path / "folder")
    assert list(tmp_path.iterdir()) == [tmp_path / "folder"]


def test_generate_says_what_a_state_has_read(model):
    cache, ids = PMNetCache(model.config), random_ids(1, 9)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    for given in (ids[:, :4], ids):
        with pytest.raises(ValueError, match="stream_bytes continues a state"):
            model.generate(given, past_key_values=cache.clone(), max_new_tokens=2)


def test_what_is_generated_belongs_to_the_last_document(model):
    ids, documents = random_ids(2, 20), torch.tensor([[0] * 12 + [1] * 8]).repeat(2, 1)
    plain = {"max_new_tokens": 6, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    alone = model.generate(ids[:, 12:], **plain)
    for use_cache in (True, False):
        found = model.generate(ids, document_ids=documents, use_cache=use_cache, **plain)
        for step, expected in zip(found.logits, alone.logits, strict=True):
            torch.testing.assert_close(step, expected, atol=1e-5, rtol=0)
    cache = PMNetCache(model.config, 2)
    with torch.no_grad():
        model(ids, document_ids=documents, past_key_values=cache)
    more = torch.cat([ids, random_ids(2, 3)], dim=1)
    found = model.generate(more, past_key_values=cache, **plain)
    expected = model.generate(more[:, 12:], **plain)
    torch.testing.assert_close(found.logits[0], expected.logits[0], atol=1e-5, rtol=0)


def test_a_state_that_has_read_is_not_read_into_again(model):
    ids = random_ids(1, 12)
    for again in ({"use_cache": False}, {"prefill_chunk_size": 4}):
        cache = PMNetCache(model.config)
        with torch.no_grad():
            model(ids[:, :6], past_key_values=cache)
        with pytest.raises(ValueError, match="reads everything again"):
            model.generate(ids, past_key_values=cache, max_new_tokens=2, **again)
        assert cache.columns == 6


def test_rows_are_selected_by_a_mask_too(model):
    cache = PMNetCache(model.config, 3)
    with torch.no_grad():
        model(random_ids(3, 9), past_key_values=cache)
    other = cache.clone()
    cache.batch_select_indices(torch.tensor([True, False, True]))
    other.batch_select_indices(torch.tensor([0, 2]))
    assert_same_state(cache, other)
