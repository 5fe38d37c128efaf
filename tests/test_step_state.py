"""The streaming state between native decode steps: every operation, forks, views, gradients that wait."""

import copy
import pickle

import pytest
import torch

import pmnet
from pmnet.model.attention import PastKeys
from pmnet.model.ring import Ring
from tests.conftest import assert_same_state, random_ids, small_model
from tests.stepping import MODELS, both, prefilled


def chosen(rows):
    return lambda cache: cache.batch_select_indices(torch.tensor(rows))


OPERATIONS = {
    "clone": lambda cache: cache.clone(),
    "reorder": lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])),
    "select": chosen([1]),
    "repeat": lambda cache: cache.batch_repeat_interleave(2),
    "crop": lambda cache: cache.crop(-cache.columns),
    "reset": lambda cache: cache.reset(),
    "to": lambda cache: cache.to("cpu"),
    "detach": lambda cache: cache.detach(),
    "replace": lambda cache: setattr(cache, "window", [PastKeys(k + 1, v + 1) for k, v in cache.window]),
}


@pytest.mark.parametrize("operation", [*OPERATIONS, "save"])
@pytest.mark.parametrize("shape", ["deep", "odd"])
def test_operations_between_steps(operation, shape, steps, tmp_path):
    model = MODELS[shape]
    cache = prefilled(model, 3)
    twin = cache.clone()

    def apply(state):
        if operation == "save":
            state.save(tmp_path / "state.safetensors")
            return pmnet.PMNetCache.load(tmp_path / "state.safetensors")
        return OPERATIONS[operation](state) or state

    for t in range(5):
        both(model, random_ids(3, 1, seed=t), cache, twin)
    cache, twin = apply(cache), apply(twin)
    assert_same_state(cache, twin)
    assert cache.columns == twin.columns
    for t in range(5):
        both(model, random_ids(cache.batch_size, 1, seed=t), cache, twin)
    assert_same_state(cache, twin)
    assert steps.count == 10


@pytest.mark.parametrize("parts", [[1, 3, 1, 1, 20, 1], [1] * 5 + [130, 1, 2]])
def test_steps_and_chunks_mix(shape, parts, steps):
    model = MODELS[shape]
    cache = prefilled(model, 2)
    twin = cache.clone()
    for part in random_ids(2, sum(parts), seed=3).split(parts, dim=1):
        both(model, part, cache, twin)
        assert_same_state(cache, twin)
    assert steps.count == len(parts)


def test_a_fork_and_its_origin_are_independent(steps):
    model = MODELS["deep"]
    origin = prefilled(model, 2)
    with torch.no_grad():
        model(random_ids(2, 1), past_key_values=origin)
        fork = origin.clone()
        for first, (a, b) in ((0, (origin, fork)), (100, (fork, origin))):
            before = b.clone()
            for t in range(first, first + 20):
                model(random_ids(2, 1, seed=t), past_key_values=a)
            assert_same_state(b, before)
            assert not torch.equal(a.memory[0], b.memory[0])
    assert steps.count == 41


def test_a_window_handed_out_stays_as_it_is(steps):
    model = MODELS["period"]
    cache = prefilled(model, 2)
    with torch.no_grad():
        for t in range(Ring.ROOM + 5):
            window = cache.window
            copies = [past.keys.clone() for past in window]
            model(random_ids(2, 1, seed=t), past_key_values=cache)
            assert all(torch.equal(past.keys, copy) for past, copy in zip(window, copies, strict=True))
            assert not torch.equal(cache.window[0].keys, copies[0])
    assert steps.count == Ring.ROOM + 5


def test_a_step_between_forward_and_backward(steps):
    """The state may go on while a loss that was computed with it waits for its gradient."""
    gradients = []
    for stepping in (False, True):
        model = small_model("period")
        cache = prefilled(model, 2)
        loss = model(random_ids(2, 9), past_key_values=cache, labels=random_ids(2, 9)).loss
        if stepping:
            with torch.no_grad():
                for _ in range(3):
                    model(random_ids(2, 1), past_key_values=cache)
        loss.backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert steps.count == 3
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_between_steps_are_whole_and_hold_no_free_places(copied, steps):
    cache = prefilled(MODELS["deep"], 2)
    both(MODELS["deep"], random_ids(2, 1), cache, cache.clone())
    assert steps.count
    assert len(pickle.dumps(cache)) < cache.nbytes + 10_000
    twin = copied(cache)
    assert_same_state(cache, twin)
    both(MODELS["deep"], random_ids(2, 1, seed=1), cache, twin)
    assert_same_state(cache, twin)
