"""Addresses of weights are kept from step to step; whatever changes in between must be seen, to the bit."""

import copy
import gc
import weakref

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

import pmnet
from pmnet.memory import MemoryRead, MemoryWrite
from pmnet.model.block import SwiGLU
from pmnet.ops import Linear, RMSNorm
from tests.conftest import random_ids, small_model
from tests.stepping import both, prefilled

SQUARE = "layers.1.memory_write_module.proj_out"


def _transposed(core):
    weight = core.get_submodule(SQUARE).weight
    weight.data = (2 * weight.data).t().contiguous().t()  # other strides


def _same_place(core):
    weight = core.get_submodule(SQUARE).weight
    weight.data = weight.data.t()  # the same address, read in another order


def _other_module(core):
    core.layers[1].mlp.up_proj = Linear(*reversed(core.layers[1].mlp.up_proj.weight.shape), bias=False)


def _other_parameter(core):
    reader = core.layers[0].memory_read_module.proj_kv
    reader.bias = nn.Parameter(torch.randn_like(reader.bias))


def _other_norm(core):
    core.norm = RMSNorm(core.config.hidden_size, eps=core.config.rms_norm_eps)
    nn.init.normal_(core.norm.weight)


def _other_anchors(core):
    core.memory_embeddings[1] = nn.Parameter(torch.randn_like(core.memory_embeddings[1]))


def _other_layers(core):
    core.layers = nn.ModuleList(copy.deepcopy(layer) for layer in core.layers)
    for weight in core.layers.parameters():
        weight.detach().add_(0.01)


CHANGES = {
    "in place": lambda core: core.layers[0].mlp.down_proj.weight.mul_(1.5),
    "other data": lambda core: setattr(core.norm.weight, "data", torch.randn_like(core.norm.weight)),
    "other module": _other_module,
    "other parameter": _other_parameter,
    "other norm": _other_norm,
    "other anchors": _other_anchors,
    "there and back": lambda core: core.bfloat16().float(),
    "bits": lambda core: setattr(core.config, "phase_bits", 4),
    "8-bit weights": pmnet.quantize_int8,
}


class Louder(Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def _finer(core):
    core.layers[0].memory_write_module.config = copy.deepcopy(core.config)
    core.layers[0].memory_write_module.config.phase_bits = 3


class Turned(nn.Module):
    def forward(self, anchors):
        return anchors + 0.5


ASIDE = {
    "other layers": _other_layers,
    "hook on anchors": lambda core: core.memory_embeddings.register_forward_hook(lambda *given: 0.5 * given[2]),
    "parametrized anchors": lambda core: nn.utils.parametrize.register_parametrization(
        core.memory_embeddings, "1", Turned()
    ),
    "pruned anchors": lambda core: nn.utils.prune.l1_unstructured(core.memory_embeddings, "1", 0.5),
    "configuration of a write": _finer,
    "heads": lambda core: vars(core.layers[0].memory_read_module).update(heads=4, size=8),
    "method": lambda core: setattr(core.layers[0].memory_read_module, "seen", lambda query, _: query.flatten(2)),
    "transposed": _transposed,
    "the same place": _same_place,
    "hook": lambda core: core.get_submodule(SQUARE).register_forward_hook(lambda module, inputs, output: 2 * output),
    "forward": lambda core: setattr(core.get_submodule(SQUARE), "forward", torch.zeros_like),
    "class": lambda core: setattr(core.get_submodule(SQUARE), "__class__", Louder),
    "scaling": lambda core: setattr(core.layers[0].self_attn, "scaling", 0.01),
    "eps": lambda core: setattr(core.layers[1].input_layernorm, "eps", 0.1),
    "eps of the last norm": lambda core: setattr(core.norm, "eps", 0.1),
    "parametrization": lambda core: nn.utils.parametrizations.weight_norm(core.get_submodule(SQUARE)),
}


def _changed(change, steps):
    model = small_model("deep")
    cache = prefilled(model, 2)
    twin = cache.clone()
    before = both(model, random_ids(2, 1), cache, twin).logits
    assert steps.count == 1
    other, other_twin = prefilled(model, 2), prefilled(model, 2)
    with torch.no_grad():
        change(model.model)
    after = both(model, random_ids(2, 1), other, other_twin).logits
    assert not torch.equal(before, after)
    return model, other, other_twin


@pytest.mark.parametrize("name", CHANGES)
def test_changes_between_steps_are_seen(name, steps):
    model, cache, twin = _changed(CHANGES[name], steps)
    assert steps.count == 2
    both(model, random_ids(2, 1), cache, twin)
    assert steps.count == 3


@pytest.mark.parametrize("name", ASIDE)
def test_a_step_stands_aside_after_a_change(name, steps):
    _changed(ASIDE[name], steps)
    assert steps.count == 1


def test_a_weight_cut_short_where_it_lies_is_seen(steps):
    model = small_model("deep")
    both(model, random_ids(2, 1), *(prefilled(model, 2) for _ in range(2)))
    weight = model.model.get_submodule(SQUARE).weight
    weight.data = weight.data[:-1]  # the same address, dense
    with torch.no_grad(), pytest.raises(ValueError, match="a bias of"):
        model(random_ids(2, 1), use_cache=True)
    assert steps.count == 1


def test_copies_have_weights_of_their_own(steps):
    model = small_model("deep")
    cache = prefilled(model, 2)
    both(model, random_ids(2, 1), cache, cache.clone())
    other = copy.deepcopy(model)
    with torch.no_grad():
        for weight in other.parameters():
            weight.mul_(1.1)
    twin = cache.clone()
    a = both(model, random_ids(2, 1), cache, cache.clone()).logits
    b = both(other, random_ids(2, 1), twin, twin.clone()).logits
    assert not torch.equal(a, b)
    assert steps.count == 3


def test_a_model_that_stepped_can_be_freed(steps):
    model = small_model("deep")
    both(model, random_ids(2, 1), *(prefilled(model, 2) for _ in range(2)))
    gone = [weakref.ref(model), weakref.ref(model.model.layers[0].mlp.up_proj.weight)]
    del model
    gc.collect()
    assert steps.count == 1
    assert not any(reference() is not None for reference in gone)


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize(
    ("kind", "name"),
    [(SwiGLU, "forward"), (RMSNorm, "forward"), (Linear, "forward"), (MemoryWrite, "propose"), (MemoryRead, "seen")],
)
def test_methods_put_into_a_class_are_called(kind, name, first, monkeypatch):
    """Before the first step, or after one: with and without a gradient, the same model."""
    model, ids, own = small_model("deep"), random_ids(2, 9), getattr(kind, name)
    with torch.no_grad():
        before = None if first else model(ids).logits

    def halved(self, *inputs):
        found = own(self, *inputs)
        return (found[0] * 0.5, *found[1:]) if isinstance(found, tuple) else found * 0.5

    monkeypatch.setattr(kind, name, halved)
    with torch.no_grad():
        after = model(ids).logits
    torch.testing.assert_close(after, model(ids).logits.detach(), atol=1e-5, rtol=0)
    assert before is None or not torch.equal(before, after)
