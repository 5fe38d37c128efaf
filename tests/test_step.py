"""The native decode step is the general path, bit for bit, and stands aside where it would not be."""

import pytest
import torch

import pmnet
from pmnet.model.ring import Ring
from pmnet.ops import Linear, use_backend
from tests.conftest import assert_same_state, random_ids, small_model
from tests.stepping import MODELS, both, general_path, prefilled


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_step_is_the_general_path(shape, batch, fresh, steps):
    model, count = MODELS[shape], Ring.ROOM + 20
    cache = pmnet.PMNetCache(model.config, batch) if fresh else prefilled(model, batch)
    twin, ids = cache.clone(), random_ids(batch, count, seed=1)
    for t in range(count):
        both(model, ids[:, t : t + 1], cache, twin)
        if t % 29 == 0 or t >= Ring.ROOM - 2:
            assert_same_state(cache, twin)
    assert cache.columns == twin.columns == count + (0 if fresh else 12)
    assert steps.count == count
    assert cache.nbytes == twin.nbytes


@pytest.mark.parametrize("threads", [1, 2, 4])
def test_a_step_has_the_bits_of_the_parallel_form(shape, threads, steps):
    model, ids = MODELS[shape], random_ids(2, 40)
    cache, before = pmnet.PMNetCache(model.config, 2), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.no_grad():
            with general_path():
                whole = model(ids, use_cache=True)
            logits = [model(ids[:, t : t + 1], past_key_values=cache).logits for t in range(40)]
    finally:
        torch.set_num_threads(before)
    assert torch.equal(torch.cat(logits, dim=1), whole.logits)
    assert_same_state(cache, whole.past_key_values)
    assert steps.count == 40


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("positions", [7, 64, 1024])
def test_a_chunk_in_steps_is_the_general_path(shape, batch, positions, steps, monkeypatch):
    """Chunks that are longer than a step, than the ring of keys, and than what few positions are computed by."""
    monkeypatch.setattr("pmnet.model.step._POSITIONS", positions)
    model, cache = MODELS[shape], pmnet.PMNetCache(MODELS[shape].config, batch)
    twin, expected = cache.clone(), 0
    for t, length in enumerate([5, 150, 1, 33, 2]):
        both(model, random_ids(batch, length, seed=t), cache, twin)
        assert_same_state(cache, twin)
        expected += -(-length // max(1, positions // batch))
    assert steps.count == expected
    assert cache.columns == twin.columns == 191
    assert cache.nbytes == twin.nbytes


def test_a_chunk_without_a_state(shape, steps):
    model, ids = MODELS[shape], random_ids(2, 40)
    with torch.no_grad():
        got = model(ids, use_cache=False)
        with general_path():
            expected = model(ids, use_cache=False)
    assert torch.equal(got.logits, expected.logits)
    assert got.past_key_values is None
    assert steps.count == 1


@pytest.mark.parametrize("start", [0, 12, 1000])
def test_a_chunk_with_positions(start, steps):
    """Those that go on, and some that begin again in the middle, which are a new document."""
    model, cache = MODELS["period"], pmnet.PMNetCache(MODELS["period"].config, 2)
    twin, positions = cache.clone(), start + torch.arange(20)[None]
    both(model, random_ids(2, 20), cache, twin, position_ids=positions)
    assert_same_state(cache, twin)
    assert steps.count == 1
    both(model, random_ids(2, 20), cache, twin, position_ids=(positions + 20) % (start + 30))
    assert_same_state(cache, twin)
    assert steps.count == 1


def test_without_recurrence(steps):
    model = small_model("period", memory_cumsum=False)
    cache = prefilled(model, 2)
    twin, memory = cache.clone(), [level.clone() for level in cache.memory]
    for t in range(20):
        both(model, random_ids(2, 1, seed=t), cache, twin)
    assert_same_state(cache, twin)
    assert all(torch.equal(a, b) for a, b in zip(cache.memory, memory, strict=True))
    assert steps.count == 20


@pytest.mark.parametrize("kind", [torch.int64, torch.int32])
def test_positions_may_jump_ahead(shape, kind, steps):
    model = MODELS[shape]
    cache = prefilled(model, 3)
    twin = cache.clone()
    for t, jump in enumerate([0, 5, 0, 100_000, 0, 1]):
        positions = (cache.next_position.unsqueeze(1) + jump).to(kind)
        both(model, random_ids(3, 1, seed=t), cache, twin, position_ids=positions)
        assert_same_state(cache, twin)
    both(model, random_ids(3, 1), cache, twin)
    assert_same_state(cache, twin)
    assert steps.count == 7


def test_mask_of_the_past_does_not_matter(steps):
    model = MODELS["deep"]
    cache = prefilled(model, 2)
    mask = torch.zeros(2, 13, dtype=torch.long)
    mask[:, -1] = 1
    both(model, random_ids(2, 1), cache, cache.clone(), attention_mask=mask)
    assert steps.count == 1


def test_generate_steps(steps):
    model, ids = MODELS["period"], random_ids(2, 7)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}
    got = model.generate(ids, **settings)
    assert steps.count == 12
    with general_path():
        assert torch.equal(model.generate(ids, **settings), got)


# Where the step stands aside


def assert_stands_aside(model, steps, **arguments):
    cache = prefilled(model, 2)
    twin = cache.clone()
    out = both(model, random_ids(2, 1), cache, twin, **arguments)
    assert steps.count == 0
    assert_same_state(cache, twin)
    return out


MODULES = [
    "layers.1", "layers.0.self_attn", "layers.1.self_attn.o_proj", "layers.0.mlp", "layers.0.mlp.up_proj",
    "layers.0.memory_read_module", "layers.0.memory_write_module", "layers.1.memory_write_module.proj_out",
    "layers.1.input_layernorm", "norm", "layers.0.self_attn.q_norm", "layers.1.self_attn.k_norm",
]  # fmt: skip


@pytest.mark.parametrize("how", ["hook", "pre-hook", "forward"])
@pytest.mark.parametrize("name", MODULES)
def test_hooks_are_called(name, how, steps):
    model, calls = small_model("deep"), []
    module = model.model.get_submodule(name)
    if how == "forward":  # as accelerate does
        forward = module.forward
        module.forward = lambda *inputs, **named: calls.append(1) or forward(*inputs, **named)
    else:
        register = module.register_forward_hook if how == "hook" else module.register_forward_pre_hook
        register(lambda *_: calls.append(1))
    cache = prefilled(model, 1)
    calls.clear()
    with torch.no_grad():
        model(random_ids(1, 1), past_key_values=cache)
    assert len(calls) == 1
    assert steps.count == 0


def test_global_hooks_are_called(steps):
    model, calls = MODELS["deep"], []
    cache = prefilled(model, 1)
    handle = torch.nn.modules.module.register_module_forward_hook(lambda module, *_: calls.append(type(module)))
    try:
        with torch.no_grad():
            model(random_ids(1, 1), past_key_values=cache)
    finally:
        handle.remove()
    assert calls.count(pmnet.ops.RMSNorm) > 10
    assert steps.count == 0


class Adapted(Linear):
    """A map of low rank beside the given one."""

    def __init__(self, base):
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.down = torch.nn.Parameter(torch.ones(2, base.in_features))

    def forward(self, input):
        return super().forward(input) + (input @ self.down.t()).sum(-1, keepdim=True)


@pytest.mark.parametrize("name", ["layers.0.self_attn.q_proj", "layers.1.memory_write_module.proj_k"])
def test_replaced_modules_are_used(name, steps):
    model, plain = small_model("deep"), small_model("deep")
    parent, _, child = name.rpartition(".")
    parent = model.model.get_submodule(parent)
    setattr(parent, child, Adapted(getattr(parent, child)))
    adapted = assert_stands_aside(model, steps).logits
    assert not torch.equal(adapted, both(plain, random_ids(2, 1), prefilled(plain, 2), prefilled(plain, 2)).logits)


def test_parts_of_another_size_than_the_configuration_says(steps):
    """The kernel takes all sizes from the configuration, and would read past the end."""
    model = small_model("deep")
    mlp = model.model.layers[1].mlp
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = Linear(32, 8), Linear(32, 8), Linear(8, 32)
    assert_stands_aside(model, steps)


def test_training_mode_and_gradients(steps):
    model = small_model("deep")
    cache = prefilled(model, 2)
    model(random_ids(2, 1), past_key_values=cache).logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    assert_stands_aside(model.train(), steps)


@pytest.mark.parametrize(
    "arguments",
    [
        {"attention_mask": torch.tensor([[1], [0]])},
        {"output_hidden_states": True},
        {"document_ids": torch.tensor([[3], [4]])},
        {"position_ids": torch.tensor([[12], [0]])},
        {"position_ids": torch.tensor([[3]])},
    ],
)
def test_unusual_arguments(arguments, steps):
    out = assert_stands_aside(MODELS["period"], steps, **arguments)
    assert (out.hidden_states is not None) == ("output_hidden_states" in arguments)


def test_wrong_arguments_are_named_and_change_nothing(steps):
    model = MODELS["deep"]
    cache = prefilled(model, 2)
    before = cache.clone()
    for name, value in (
        ("attention_mask", torch.ones(1, 13)),
        ("attention_mask", torch.ones(13)),
        ("position_ids", torch.full((2, 2), 99)),
        ("position_ids", torch.tensor([99, 99])),
    ):
        with pytest.raises(ValueError, match=f"{name} must be"), torch.no_grad():
            model(random_ids(2, 1), past_key_values=cache, **{name: value})
    with pytest.raises(ValueError, match="does not fit"), torch.no_grad():
        model(random_ids(1, 1), past_key_values=cache)
    assert steps.count == 0
    assert_same_state(cache, before)


def test_unusual_weights(steps):
    model = small_model("deep")
    for parameter in (model.model.memory_embeddings[1], model.model.layers[0].mlp.up_proj.weight):
        plain = parameter.data
        parameter.data = plain.mT.contiguous().mT
        assert_stands_aside(model, steps)
        parameter.data = plain
    assert_stands_aside(small_model("deep").double(), steps)


def test_other_backends_and_autocast(steps):
    with use_backend("torch"):
        assert_stands_aside(MODELS["deep"], steps)
    with torch.autocast("cpu", torch.bfloat16):
        assert_stands_aside(MODELS["deep"], steps)


def test_a_state_of_another_precision(steps):
    """Keys kept in half precision by a float32 model: half the memory, converted on use."""
    model = MODELS["deep"]
    cache = pmnet.PMNetCache(model.config, 2, dtype=torch.bfloat16)
    twin = cache.clone()
    for t in range(9):
        both(model, random_ids(2, 1, seed=t), cache, twin)
        assert_same_state(cache, twin)
    assert cache.window[0].keys.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_embeddings_of_another_precision(dtype):
    """The embedding layer is the caller's business; the rest of the model keeps its precision."""
    model = small_model("deep").to(dtype)
    with torch.no_grad():
        given = model.get_input_embeddings()(random_ids(2, 15)).float()
        expected = model(inputs_embeds=given.to(dtype)).logits.double()
        got = model(inputs_embeds=given).logits.double()
    limit = 0.05 if dtype == torch.bfloat16 else 1e-5
    assert (got - expected).norm() < limit * expected.norm()
