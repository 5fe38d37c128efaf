"""A state is what it was before a call or what it is after it, whatever comes in between, and no file can break it."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import pmnet
from tests.conftest import assert_same_state, random_ids, read, small_config, small_model


@pytest.fixture
def model():
    return small_model("deep")


def _after(model, ids):
    cache = pmnet.PMNetCache(model.config, len(ids))
    with torch.no_grad():
        model(ids, past_key_values=cache)
    return cache


@pytest.mark.parametrize("length", [1, 1000])
def test_an_interrupt_in_a_native_step_leaves_a_whole_state(length, monkeypatch):
    model, ids = small_model("deep"), random_ids(1, 1100)
    cache, kernels = _after(model, ids[:, :100]), pmnet.ops.native.library()
    if kernels is None:
        pytest.skip("no compiler")

    class Interrupted:
        def step(self, *arguments):
            kernels.step(*arguments)
            raise KeyboardInterrupt

    monkeypatch.setattr("pmnet.model.step.library", Interrupted)
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(ids[:, 100 : 100 + length], past_key_values=cache)
    monkeypatch.undo()
    assert cache.columns == int(cache.seen) > 100
    assert_same_state(cache, _after(model, ids[:, : cache.columns]))


def test_a_call_that_fails_on_its_way_moves_nothing(model):
    cache, before = (_after(model, random_ids(1, 20)) for _ in range(2))
    last = model.model.layers[-1]
    hook = last.mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt), torch.no_grad():
        model(random_ids(1, 9), past_key_values=cache)
    hook.remove()
    for labels in (random_ids(1, 9) + 400, -random_ids(1, 9) - 1):
        with pytest.raises(ValueError, match=r"labels must lie in \[0, 384\) or be -100"), torch.no_grad():
            model(random_ids(1, 9), past_key_values=cache, labels=labels)
    assert_same_state(cache, before)


@pytest.mark.parametrize("name", ["seen", "in_document", "next_position"])
@pytest.mark.parametrize("value", [-(2**63), -1, 2**62, 2**63 - 1])
def test_a_state_file_with_impossible_counters_is_damaged(tmp_path, model, name, value):
    cache = _after(model, random_ids(1, 20))
    getattr(cache, name).fill_(value)
    cache.save(tmp_path / "state")
    with pytest.raises(ValueError, match="damaged"):
        pmnet.PMNetCache.load(tmp_path / "state")


@pytest.mark.parametrize("columns", ["-7", "Infinity", "4611686018427387904", '"x"'])
def test_a_state_file_with_impossible_columns_is_damaged(tmp_path, model, columns):
    _after(model, random_ids(1, 20)).save(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    save_file(tensors, tmp_path / "state", {"format": "pmnet-cache-1", "state": f'{{"columns": {columns}}}'})
    with pytest.raises(ValueError, match="damaged"):
        pmnet.PMNetCache.load(tmp_path / "state")


@pytest.mark.parametrize("kind", [torch.float16, torch.int8])
def test_keys_of_several_types_are_refused(tmp_path, model, kind):
    _after(model, random_ids(1, 20)).save(tmp_path / "state")
    tensors = load_file(tmp_path / "state")
    tensors["keys.1"] = tensors["keys.1"].to(kind)
    save_file(tensors, tmp_path / "state", {"format": "pmnet-cache-1", "state": '{"columns": 20}'})
    cache = pmnet.PMNetCache.load(tmp_path / "state")
    with pytest.raises(ValueError, match="one floating type"), torch.no_grad():
        model(random_ids(1, 1), past_key_values=cache)


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("count", [-1, -4000, -(2**63)])
def test_counters_set_below_zero_do_not_reach_outside_the_window(model, count, length):
    cache = _after(model, random_ids(1, 30))
    cache.in_document.fill_(count)
    with torch.no_grad():
        assert model(random_ids(1, length), past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16])
def test_a_state_takes_the_type_of_the_model_and_not_of_embeddings(model, kind):
    embedded = model.model.embed_tokens(random_ids(2, 20)).detach().to(kind)
    with torch.no_grad():
        whole = model(inputs_embeds=embedded).logits
        first = model(inputs_embeds=embedded[:, :10], use_cache=True)
        rest = model(inputs_embeds=embedded[:, 10:], past_key_values=first.past_key_values)
    assert first.past_key_values.dtype == torch.float32
    assert torch.equal(torch.cat([first.logits, rest.logits], dim=1), whole)
    with pytest.raises(ValueError, match="must be floating"):
        model(inputs_embeds=embedded.long())


def test_many_slots_are_exact_as_well():
    model, ids = small_model("deep", num_memory=130, num_hidden_layers=2), random_ids(3, 40)
    whole, pieces = read(model, ids, 40), read(model, ids, 1)
    assert torch.equal(whole[0], pieces[0])
    assert_same_state(whole[1], pieces[1])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_stands_at_padding_reaches_nothing(model, bad, side):
    ids, mask = random_ids(1, 20), torch.ones(1, 20, dtype=torch.int64)
    pads = slice(0, 5) if side == "left" else slice(15, 20)
    mask[:, pads] = 0
    clean = model.model.embed_tokens(ids).detach()
    dirty = clean.clone()
    dirty[:, pads] = bad
    caches = [pmnet.PMNetCache(model.config) for _ in range(2)]
    with torch.no_grad():
        logits = [
            model(inputs_embeds=x, attention_mask=mask, past_key_values=cache).logits[mask == 1]
            for x, cache in zip((clean, dirty), caches, strict=True)
        ]
    assert torch.equal(*logits)
    assert_same_state(*caches)


def test_positions_are_integers(model):
    ids, positions = random_ids(1, 20), torch.arange(20)[None] % 10
    with pytest.raises(ValueError, match="position_ids must be integers"):
        model(ids, position_ids=positions.float())
    caches = [pmnet.PMNetCache(model.config) for _ in range(2)]
    with torch.no_grad():
        for cache, kind in zip(caches, (torch.int64, torch.int32), strict=True):
            model(ids, position_ids=positions.to(kind), past_key_values=cache)
    assert_same_state(*caches)


@pytest.mark.parametrize("kind", [torch.int16, torch.uint8, torch.bool, torch.float32])
def test_ids_of_another_type_are_named(model, kind):
    with pytest.raises(ValueError, match="input_ids must be int64 or int32"):
        model(random_ids(1, 5).to(kind))


def test_a_state_is_not_cast():
    with pytest.raises(ValueError, match=r"not cast to torch\.bfloat16"):
        pmnet.PMNetCache(small_config("deep")).to(torch.bfloat16)


@pytest.mark.parametrize("gradient", [False, True])
def test_positions_that_are_no_integers_are_refused(model, gradient):
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match="position_ids must be integers"):
        model(random_ids(1, 9), position_ids=torch.arange(9.0).unsqueeze(0) + 0.5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"labels": random_ids(1, 9)}, "labels must be"), ({"logits_to_keep": torch.tensor([0, 9])}, "got 9")],
)
def test_what_does_not_fit_the_logits_is_found_before_the_state_moves(model, arguments, message):
    cache = pmnet.PMNetCache(model.config, 2)
    with pytest.raises(ValueError, match=message):
        model(random_ids(2, 9), past_key_values=cache, **arguments)
    assert cache.columns == 0
