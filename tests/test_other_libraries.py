"""Weights and indices that other code has changed: used as they are or refused, never read past their end."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as dual
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.testing._internal.two_tensor import TwoTensor
from transformers import Trainer, TrainingArguments

import pmnet
from pmnet.ops import geometry, phase_write, window_attention
from tests.conftest import random_ids, small_model

LINEAR = ["self_attn.q_proj", "mlp.down_proj", "memory_read_module.proj_kv", "memory_write_module.proj_out"]


@pytest.mark.parametrize("name", LINEAR)
def test_a_weight_of_another_class_is_not_read_by_address(name):
    model = small_model("deep")
    expected = model(random_ids(2, 20)).logits.detach()
    layer = model.model.layers[0].get_submodule(name)
    weight = layer.weight.detach()
    layer.weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    with torch.no_grad():
        for length in (20, 1):  # many positions and a step
            got = model(random_ids(2, 20)[:, :length]).logits
            got = got.a if isinstance(got, TwoTensor) else got
            assert torch.allclose(got, expected[:, :length], atol=1e-5)


def test_label_smoothing_predicts_the_next_byte(tmp_path):
    model, ids = small_model("deep"), random_ids(2, 12)
    arguments = TrainingArguments(str(tmp_path), label_smoothing_factor=1e-9, report_to="none", use_cpu=True)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    assert torch.allclose(loss, model(ids, labels=ids).loss, atol=1e-5)


@pytest.mark.parametrize("group", [-1, 4, 10**9])
def test_groups_that_are_not_there_are_named(group):
    groups, anchors = torch.tensor([[0, 1, 3, group]]), torch.randn(4, 3, 5)
    with pytest.raises(ValueError, match=rf"groups must lie in \[0, 4\), got {group}"):
        phase_write(torch.rand(1, 4, 3), torch.randn(1, 4, 5), groups, torch.zeros(1, 4, 3, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match=rf"groups must lie in \[0, 4\), got {group}"):
        geometry(None, anchors, groups)


@pytest.mark.parametrize("span", [0, -900, 5])
def test_a_span_beyond_the_window_is_named(span):
    query, keys = torch.randn(1, 2, 1, 16), torch.randn(1, 5, 1, 16)  # a window of four keys
    with pytest.raises(ValueError, match="span"):
        window_attention(query, keys, keys, torch.tensor([[1, span]]), 1.0)


def test_layers_refuse_forward_mode_as_the_model_does():
    block = small_model("deep").model.layers[0]
    hidden = torch.randn(1, 4, block.mlp.gate_proj.in_features)
    for module in (block.mlp, block.mlp.gate_proj, block.input_layernorm):
        with pytest.raises(NotImplementedError, match="forward-mode"), dual.dual_level():
            module(hidden)


def test_a_refused_cast_of_8_bit_weights_changes_nothing():
    model = pmnet.quantize_int8(small_model("deep"))
    before = model(random_ids(1, 9)).logits
    for cast in (model.half, model.double, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="cannot be cast"):
            cast()
    assert torch.equal(model(random_ids(1, 9)).logits, before)


def test_angles_cast_between_layers_are_refused():
    assert MixedPrecisionPolicy().cast_forward_inputs  # what casts them, unless it is told not to
    model = small_model("deep")
    writer = model.model.layers[1].memory_write_module
    writer.register_forward_pre_hook(
        lambda _, given: (given[0], given[1]._replace(field=given[1].field.bfloat16()), *given[2:])
    )
    with pytest.raises(ValueError, match="cast_forward_inputs=False"):
        model(random_ids(1, 5))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_model_with_layers_cut_off_is_named(gradient):
    model = copy.deepcopy(small_model("deep"))
    model.model.layers = model.model.layers[:1]
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=r"1 layers .* num_hidden_layers 3"):
        model(random_ids(1, 5))
