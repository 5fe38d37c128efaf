"""The Hugging Face surface: Auto classes, round trips, precision, checkpointing, configuration, bad input."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

import pmnet
from tests.conftest import random_ids, small_config, small_model

SOURCE = Path(pmnet.__file__).parent


def test_auto_classes_round_trip(tmp_path, shape):
    model, ids = small_model(shape), random_ids(1, 30)
    model.save_pretrained(tmp_path)
    pmnet.ByteTokenizer().save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(loaded, pmnet.PMNetForCausalLM)
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == model.config.to_diff_dict()
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
        hidden = AutoModel.from_pretrained(tmp_path)(ids, output_hidden_states=True)
    assert isinstance(AutoTokenizer.from_pretrained(tmp_path), pmnet.ByteTokenizer)
    assert len(hidden.hidden_states) == model.config.num_hidden_layers + 1
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


def test_published_config_keys_load():
    published = {
        "model_type": "PMNet", "vocab_size": 384, "hidden_size": 512, "rope_theta": 1000000.0, "memory_cumsum": True,
        "use_sliding_window": True, "max_window_layers": 0, "bos_token_id": 254, "eos_token_id": 255, "num_memory": 4,
    }  # fmt: skip
    config = pmnet.PMNetConfig(**published)
    assert config.rope_theta == 1e6
    assert config.bos_token_id == 254
    assert config.num_groups == 85


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"num_attention_heads": 3}, "num_attention_heads"),
        ({"memory_write_period": 2}, "memory_write_period"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_memory": 1}, "num_memory"),
        ({"head_dim": 7}, "head_dim"),
        ({"phase_bits": 33}, "phase_bits"),
        ({"phase_bits": 0}, "phase_bits"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({"use_sliding_window": False}, "use_sliding_window"),
        ({"memory_size": 0}, "memory_size"),
        ({"hidden_size": "64"}, "hidden_size"),
        ({"sliding_window": 4.5}, "sliding_window"),
        ({"memory_cumsum": "no"}, "memory_cumsum"),
        ({"attention_dropout": 1.0}, "attention_dropout"),
        ({"initializer_range": -1}, "initializer_range"),
    ],
)
def test_impossible_configurations_are_named(change, word):
    with pytest.raises(ValueError, match=word):
        small_config("deep", **change)


def test_initialisation_follows_the_configuration():
    torch.manual_seed(0)
    published = pmnet.PMNetForCausalLM(pmnet.PMNetConfig(num_hidden_layers=6, memory_write_period=3))
    assert abs(published.model.layers[0].mlp.up_proj.weight.std() - 0.02) < 1e-3
    assert abs(published.model.memory_embeddings[1].std() - 0.02) < 1e-3
    ours = pmnet.PMNetForCausalLM(small_config("wide"))
    assert abs(ours.model.layers[0].mlp.up_proj.weight.std() - 0.45 * 320**-0.5) < 1e-3
    assert abs(ours.model.memory_embeddings[1].std() - 0.5) < 0.03
    assert abs(ours.model.embed_tokens.weight.std() - 0.02) < 1e-3
    assert ours.model.layers[0].memory_read_module.proj_q.bias.abs().max() == 0


def test_labels_and_logits_to_keep():
    model, ids = small_model("deep"), random_ids(2, 20)
    with torch.no_grad():
        whole = model(ids, labels=ids)
        last = model(ids, logits_to_keep=3).logits
    assert torch.equal(last, whole.logits[:, -3:])
    expected = torch.nn.functional.cross_entropy(whole.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert torch.allclose(whole.loss, expected)


def test_padding_does_not_change_the_loss():
    """On the left too, where the first byte of a text would be predicted from padding."""
    model, ids = small_model("deep"), random_ids(2, 20)
    whole = model(ids, labels=ids).loss
    for left, right in ((5, 0), (0, 5), (3, 2)):
        mask = F.pad(torch.ones(2, 20, dtype=torch.int64), (left, right))
        padded, labels = (F.pad(ids, (left, right), value=value) for value in (256, -100))
        assert torch.allclose(model(padded, attention_mask=mask, labels=labels).loss, whole, atol=1e-6)


def test_the_last_hidden_state_is_the_one_that_is_returned():
    out = small_model("deep").model(random_ids(2, 7), output_hidden_states=True)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)


def test_what_would_be_silently_wrong_is_refused(tmp_path):
    model, ids = small_model("deep"), random_ids(1, 5)
    with pytest.raises(ValueError, match="use_reentrant"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(NotImplementedError, match="forward-mode"), torch.autograd.forward_ad.dual_level():
        model(ids)
    with pytest.raises(ValueError, match="on meta"):
        model(ids, past_key_values=pmnet.PMNetCache(model.config, 1, "meta"))
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="phase_bits"):
        pmnet.PMNetForCausalLM.from_pretrained(tmp_path, phase_bits=64)
    with pytest.raises(ValueError, match="cannot be saved"):
        pmnet.quantize_int8(model).save_pretrained(tmp_path / "int8")
    assert not (tmp_path / "int8").exists()


def test_an_adapter_of_the_keys_and_values_is_called():
    """Its maps are fused with the read, unless a module was put in their place."""
    model, ids = small_model("deep"), random_ids(2, 20)
    with torch.no_grad():
        plain = model(ids).logits
        reader = model.model.layers[1].memory_read_module
        reader.proj_kv = nn.Sequential(reader.proj_kv)
        assert torch.allclose(model(ids).logits, plain, atol=1e-5)
        reader.proj_kv.append(Doubled())
        adapted = model(ids).logits
        assert (adapted - plain).norm() > 0.01 * plain.norm()
        reader.proj_kv = reader.proj_kv[0]
        reader.proj_kv.register_forward_hook(lambda module, inputs, output: 2 * output)
        assert torch.allclose(model(ids).logits, adapted, atol=1e-5)


class Doubled(nn.Module):
    """Stands for what an adapter adds."""

    def forward(self, x):
        return 2 * x


def test_gradient_checkpointing_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        model = small_model("period").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(random_ids(2, 30), labels=random_ids(2, 30)).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_whole_model_gradient_in_float64():
    """Directional derivative against a finite difference, in eval mode (no 1/sqrt(count) factor)."""
    model = small_model("period", num_hidden_layers=2, phase_bits=32).double()  # one level: routes cannot flip
    ids, parameters = random_ids(1, 25), list(model.parameters())
    directions = [torch.randn_like(p) for p in parameters]

    def loss_of(network):
        return torch.nn.functional.cross_entropy(network(ids).logits[0, :-1], ids[0, 1:])

    loss_of(model).backward()
    slope = sum((p.grad * d).sum() for p, d in zip(parameters, directions, strict=True))

    def at(step):
        with torch.no_grad():
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            loss = loss_of(model)
            for p, d in zip(parameters, directions, strict=True):
                p -= step * d
        return loss

    step = 1e-5
    difference = (at(step) - at(-step)) / (2 * step)
    assert abs(slope - difference) < 2e-3 * abs(difference)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_half_precision_keeps_phases_exact(attention):
    """Pure bf16 weights: the memory stays int32, finite, and keeps rotations far below bf16's resolution."""
    model = small_model("deep", attn_implementation=attention).to(torch.bfloat16)
    with torch.no_grad():
        out = model(random_ids(2, 100))
    assert out.logits.dtype == torch.bfloat16
    assert out.logits.isfinite().all()
    state = out.past_key_values.memory[0]
    assert state.dtype == torch.int32
    assert (state.abs() % 2**16 != 0).any()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = small_model("deep", attn_implementation=attention)(random_ids(2, 100))
    assert mixed.logits.isfinite().all()


def test_bad_input_is_named():
    model = small_model("deep")
    with pytest.raises(ValueError, match=r"\[0, 384\), got 384"):
        model(torch.tensor([[3, 384]]))
    with pytest.raises(ValueError, match="got -1"):
        model(torch.tensor([[-1]]))
    with pytest.raises(ValueError, match="at least one position"):
        model(torch.zeros(1, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="attention_mask must be"):
        model(random_ids(2, 5), attention_mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="position_ids must be"):
        model(random_ids(2, 5), position_ids=torch.zeros(2, 4, dtype=torch.long))
    with pytest.raises(ValueError, match="exactly one"):
        model()
    with pytest.raises(ValueError, match="must be a PMNetCache"):
        model(random_ids(1, 2), past_key_values=object())


def test_decode_step_compiles_without_graph_breaks():
    model, ids = small_model("deep"), random_ids(2, 12)
    cache, traced = pmnet.PMNetCache(model.config, 2), pmnet.PMNetCache(model.config, 2)

    def step(token, state):
        logits = model(token, past_key_values=state).logits
        return logits, state

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        model(ids, past_key_values=traced)
        for t in range(3):
            expected, _ = step(ids[:, t : t + 1], cache)
            got, _ = compiled(ids[:, t : t + 1], traced)
            assert torch.equal(expected, got)
    assert all(torch.equal(a, b) for a, b in zip(cache.memory, traced.memory, strict=True))


@given(st.binary(max_size=200))
def test_any_bytes_round_trip(data):
    for tokenizer in (pmnet.ByteTokenizer(errors="surrogateescape"), pmnet.ByteTokenizer(published_ids=True)):
        assert tokenizer.decode_bytes(tokenizer.encode_bytes(data)) == data
    text = data.decode("utf-8", "surrogateescape")
    tokenizer = pmnet.ByteTokenizer(errors="surrogateescape")
    assert tokenizer.decode_bytes(tokenizer(text)["input_ids"]) == data
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_special_tokens(tmp_path):
    ours, published = pmnet.ByteTokenizer(), pmnet.ByteTokenizer(published_ids=True)
    assert (ours.pad_token_id, ours.bos_token_id, ours.eos_token_id) == (256, 257, 258)
    assert (published.pad_token_id, published.bos_token_id, published.eos_token_id) == (0, 254, 255)
    assert ours("<bos>")["input_ids"] == list(b"<bos>")
    assert ours.decode([257, 72, 105, 258], skip_special_tokens=True) == "Hi"
    assert len(ours) == 384
    published.save_pretrained(tmp_path)
    assert pmnet.ByteTokenizer.from_pretrained(tmp_path).eos_token_id == 255
    with pytest.raises(ValueError, match="negative"):
        ours.decode([-1])


def test_added_tokens_have_ids_of_their_own(tmp_path):
    tokenizer = pmnet.ByteTokenizer()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, pmnet.ByteTokenizer.from_pretrained(tmp_path)):
        assert len(each) == 386
        assert each.convert_tokens_to_ids(["<think>", "<|im_start|>", "<0x41>", "<pad>"]) == [384, 385, 65, 256]
        assert each.convert_tokens_to_ids(["<0xZZ>", "<reserved_x>"]) == [None, None]
        assert each.decode([65, 385, 384, 66]) == "A<|im_start|><think>B"


ORDER = ["atomic", "config", "ops", "memory", "model", "data", "baselines", "train", "eval", "report", "cli"]


def test_imports_flow_one_way():
    for path in SOURCE.rglob("*.py"):
        package = path.relative_to(SOURCE).parts[0].removesuffix(".py").split("_")[0]
        if path.parent == SOURCE and path.name in ("__init__.py", "__main__.py"):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pmnet."):
                target = node.module.split(".")[1].split("_")[0]
                assert ORDER.index(target) <= ORDER.index(package), f"{path} imports {node.module}"


def test_public_names_are_documented():
    for name in pmnet.__all__:
        thing = getattr(pmnet, name)
        assert inspect.getdoc(thing), name
        if inspect.isclass(thing):
            for method, value in vars(thing).items():
                if not method.startswith("_") and callable(value):
                    assert inspect.getdoc(value), f"{name}.{method}"


def test_files_are_short():
    for path in SOURCE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 300, path
