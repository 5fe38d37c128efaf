"""The published form computes what ours does, and every FLOP and weight is counted once."""

import copy
import json

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pmnet
from benchmarks.published import Published, State
from pmnet.ops import use_backend
from pmnet.report import flops
from pmnet.train.recipes import MODELS
from tests.conftest import random_ids, run_cli, small_config, small_model


def published_of(model):
    published = Published(model.config)
    published.load_state_dict(model.state_dict())
    return published.train(model.training)


# The yardstick


def test_published_is_no_further_from_float64_than_rounding(shape):
    model, ids = small_model(shape, phase_bits=32), random_ids(2, 60)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(ids).logits
        ours, published = model(ids).logits, published_of(model)(ids)
    for logits in (ours, published):
        assert (logits - truth).abs().max() < 1e-5 * truth.abs().max()  # float32 sums of a few hundred terms


def test_published_gradients_are_ours():
    model, ids = small_model("period", phase_bits=32).train(), random_ids(2, 40)
    published = published_of(model)
    for logits in (model(ids).logits, published(ids)):
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    theirs = dict(published.named_parameters())
    for name, parameter in model.named_parameters():
        assert (parameter.grad - theirs[name].grad).norm() < 1e-3 * parameter.grad.norm(), name


def test_published_decodes_what_it_computes_in_parallel(shape):
    published, ids, state = published_of(small_model(shape, phase_bits=32)), random_ids(2, 40), State()
    with torch.no_grad():
        whole = published(ids)
        parts = [published(part, state) for part in ids.split([17, 1, 1, 20, 1], dim=1)]
    assert (torch.cat(parts, 1) - whole).abs().max() < 1e-3
    assert state.position == 40


# Counts


def counted_flops(model, ids):
    """FLOP of every module of one call, by `torch.utils.flop_counter`, which sees only products of torch."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("torch"):
        model(ids)
    counts = {name.split(".", 1)[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    return lambda name: counts.get(name, 0)


@pytest.mark.parametrize("form", ["ours", "published"])
def test_products_are_those_that_run(form):
    model, ids = small_model("period"), random_ids(2, 24)
    config = model.config
    count = counted_flops(model if form == "ours" else published_of(model), ids)
    expected = {part.name: ids.numel() * getattr(part, form).flops for part in flops.parts(config)}
    scores = 2 * ids.numel() * config.num_memory * config.memory_size  # differences and sums, no matrix product
    mixing = scores * config.num_memory_read_heads if form == "published" else 0  # elementwise there
    layer = "model.layers.2."
    attention = sum(count(f"{layer}self_attn.{name}_proj") for name in "qkvo")
    assert attention == expected["attention projections"]
    assert count(f"{layer}mlp") == expected["MLP"]
    assert count(f"{layer}memory_write_module") == expected["write"] - scores
    read = sum(expected[f"read: {name}"] for name in ("queries", "keys", "values", "output"))
    assert count(f"{layer}memory_read_module") == read - mixing
    assert count("lm_head") == expected["embedding and head"]


def test_attention_pays_for_its_keys():
    config = small_config("period")

    def of(length):
        part = next(part for part in flops.parts(config, length) if part.name == "window attention")
        return part.ours.flops, part.published.flops

    per_key = 4 * config.num_attention_heads * config.head_dim
    assert of(None) == (9 * per_key, 9 * per_key)
    assert of(100) == (9 * per_key, 100 * per_key)
    assert of(5) == (5 * per_key, 5 * per_key)


@pytest.mark.parametrize("preset", MODELS)
def test_weights_are_all_accounted_for(preset):
    config = MODELS[preset]()
    with torch.device("meta"):
        model = pmnet.PMNetForCausalLM(config)
    found = {}
    for name, parameter in model.named_parameters():
        found[part_of(name, parameter)] = found.get(part_of(name, parameter), 0) + parameter.numel()
    values = found["read: keys"] // 2  # one matrix holds keys and values
    found |= {"read: keys": values, "read: values": values}
    counted = {part.name: part.layers * part.parameters for part in flops.parts(config) if part.parameters}
    assert counted == found
    assert flops.facts(config)["weight_bytes"] == 4 * sum(counted.values()) == 4 * model.num_parameters()


def part_of(name, parameter):
    inside = {
        "self_attn": "attention projections", "input_layernorm": "attention projections", "mlp": "MLP",
        "post_attention_layernorm": "MLP", "memory_write_module": "write", "memory_embeddings": "anchors",
        "embed_tokens": "embedding and head", "model.norm": "embedding and head", "read_module.proj_kv": "read: keys",
        "read_module.proj_out": "read: output", "memory_read_module": "read: queries",
    }  # fmt: skip
    return next(part for key, part in inside.items() if key in name)


def test_decoding_reads_what_a_step_visits():
    config = small_config("deep")
    whole, one, two = 4 * flops.parameters(config), flops.decode_bytes(config), flops.decode_bytes(config, 2)
    group = 4 * config.num_memory * config.memory_size
    assert one["weights"] + group * config.num_groups == whole
    assert one["visited anchors"] == one["visited phases"] == config.num_levels * group
    assert two["visited anchors"] == (2 * config.num_levels - 1) * group  # the root has one group only
    assert two["keys and values"] == 2 * one["keys and values"]
    cache = pmnet.PMNetCache(config)
    state = flops.state_bytes(config)
    assert state["phases"] == sum(level.nbytes for level in cache.memory)
    assert state["total"] <= cache.nbytes


def test_flops_command(tmp_path):
    file = tmp_path / "counts.json"
    code, printed = run_cli(["flops", "--preset", "119m", "--length", "1024", "--json", str(file)])
    assert code == 0
    assert "read: values" in printed
    stored = json.loads(file.read_text())
    assert stored["weight_bytes"] == 4 * 118_970_368
    assert stored["training_flops"]["ours"] == 3 * stored["forward_flops"]["ours"]
    small_model("deep").save_pretrained(tmp_path / "model")
    assert run_cli(["flops", str(tmp_path / "model")])[0] == 0
    for arguments in (["flops"], ["flops", "--preset", "huge"], ["flops", str(tmp_path)]):
        code, printed = run_cli(arguments)
        assert code == 1
        assert printed.startswith("pmnet: ")


# Contenders
