"""What a user of `transformers` and `accelerate` tries, beyond reading ids and saving weights."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import pmnet
from tests.conftest import random_ids, small_config, small_model

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 256, "eos_token_id": None}

WIDTH = small_config("deep").hidden_size


@pytest.fixture(scope="module")
def model():
    return small_model("deep")


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("shape", [(2, 9, 4), (2, 9, WIDTH - 1), (2, 9, 256), (9, WIDTH), (2, 2, 9, WIDTH)])
def test_embeddings_of_another_shape_are_refused(model, shape, gradient):
    assert model.config.hidden_size == WIDTH
    for part in (model, model.model):
        with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match=rf"positions, {WIDTH}\]"):
            part(inputs_embeds=torch.zeros(shape))


def test_an_embedding_of_another_width_is_refused(model):
    other = copy.deepcopy(model)
    other.set_input_embeddings(nn.Embedding(384, WIDTH // 2))
    with torch.no_grad(), pytest.raises(ValueError, match=rf"positions, {WIDTH}\]"):
        other(random_ids(1, 5))


@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("cut", [lambda anchor: anchor[:, :-1], lambda anchor: anchor[:-1], lambda anchor: anchor[0]])
def test_anchors_of_another_shape_are_refused(model, cut, gradient):
    other = copy.deepcopy(model)
    other.model.memory_embeddings[1] = nn.Parameter(cut(other.model.memory_embeddings[1].detach()).clone())
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match="anchors of level 1"):
        other(random_ids(1, 5))


@pytest.mark.parametrize("gradient", [False, True])
def test_a_bias_of_another_size_is_refused(model, gradient):
    other = copy.deepcopy(model)
    read = other.model.layers[0].memory_read_module
    read.proj_q.bias = nn.Parameter(read.proj_q.bias.detach()[:-1].clone())
    with torch.set_grad_enabled(gradient), pytest.raises(ValueError, match="a bias of"):
        other(random_ids(1, 5))


@pytest.mark.parametrize("extra", [{}, {"num_beams": 2}, {"use_cache": False}])
def test_generation_from_embeddings_is_that_from_ids(model, extra):
    ids = random_ids(2, 11)
    expected = model.generate(ids, **GREEDY, **extra)
    found = model.generate(inputs_embeds=model.get_input_embeddings()(ids), **GREEDY, **extra)
    assert torch.equal(found, expected[:, 11:])


@pytest.mark.parametrize("size", [1, 4, 5])
def test_documents_of_a_prompt_may_be_read_in_chunks(model, size):
    ids, documents = random_ids(2, 20), torch.tensor([[0] * 8 + [1] * 12, [0] * 3 + [1] * 9 + [2] * 8])
    expected = [model.generate(ids[i : i + 1, n:], **GREEDY)[0, -6:] for i, n in ((0, 8), (1, 12))]
    found = model.generate(ids, document_ids=documents, prefill_chunk_size=size, **GREEDY)
    assert torch.equal(found[:, -6:], torch.stack(expected))
    with pytest.raises(ValueError, match="not both"):
        model.generate(ids, document_ids=documents, position_ids=torch.arange(20).expand(2, 20), **GREEDY)


@pytest.mark.parametrize("name", ["cu_seq_lens_q", "seq_idx"])
def test_packing_that_only_other_kernels_know_is_refused(model, name):
    packed = {name: torch.tensor([0, 5, 9], dtype=torch.int32), "labels": random_ids(1, 9)}
    with pytest.raises(ValueError, match=f"{name} alone"):
        model(random_ids(1, 9), **packed)
    assert model(random_ids(1, 9), position_ids=torch.arange(9).unsqueeze(0) % 5, **packed).loss.isfinite()


def test_hidden_states_may_be_asked_for_in_the_configuration():
    config = copy.deepcopy(small_model("deep").config)
    config.output_hidden_states = True
    asked = pmnet.PMNetForCausalLM(config).eval()
    with torch.no_grad():
        assert len(asked(random_ids(1, 5)).hidden_states) == config.num_hidden_layers + 1
        assert asked(random_ids(1, 5), output_hidden_states=False).hidden_states is None


@pytest.mark.filterwarnings("ignore:You are calling .generate")  # of any model whose weights are elsewhere
def test_offloaded_weights_are_loaded_when_they_are_needed(model):
    ids = random_ids(2, 9)
    expected = model.generate(ids, **GREEDY)
    away = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert {parameter.device.type for parameter in away.parameters()} == {"meta"}
    assert torch.equal(away.generate(ids, **GREEDY), expected)


def test_what_is_saved_again_points_at_no_code_that_is_not_there(tmp_path, model):
    from pmnet.model.export import export_code

    model.save_pretrained(tmp_path / "a")
    pmnet.ByteTokenizer().save_pretrained(tmp_path / "a")
    export_code(tmp_path / "a")
    assert "auto_map" in (tmp_path / "a" / "config.json").read_text()
    AutoModelForCausalLM.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    AutoTokenizer.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    for path in (tmp_path / "b").glob("*.json"):
        assert "auto_map" not in path.read_text()
    assert type(AutoTokenizer.from_pretrained(tmp_path / "b", trust_remote_code=True)) is pmnet.ByteTokenizer
    assert type(AutoConfig.from_pretrained(tmp_path / "b", trust_remote_code=True)) is pmnet.PMNetConfig


SPECIAL = {
    "eos is pad": lambda t: setattr(t, "eos_token", t.pad_token),
    "eos is bos": lambda t: setattr(t, "eos_token", t.bos_token),
    "pad is eos": lambda t: setattr(t, "pad_token", t.eos_token),
    "a new pad": lambda t: t.add_special_tokens({"pad_token": "[PAD]"}),
    "a new eos": lambda t: t.add_special_tokens({"eos_token": "<end>"}),
    "a marker": lambda t: setattr(t, "eos_token", "<copy>"),
    "a byte": lambda t: setattr(t, "eos_token", "<0x0A>"),
}


@pytest.mark.parametrize("published", [False, True])
@pytest.mark.parametrize("change", SPECIAL)
def test_special_tokens_keep_their_ids_when_they_are_saved(tmp_path, change, published):
    tokenizer = pmnet.ByteTokenizer(published_ids=published)
    SPECIAL[change](tokenizer)
    tokenizer.save_pretrained(tmp_path)
    again = pmnet.ByteTokenizer.from_pretrained(tmp_path)
    assert again.get_vocab() == tokenizer.get_vocab()
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "vocab_size"):
        assert getattr(again, name) == getattr(tokenizer, name)


def test_ids_of_a_padded_vocabulary_can_be_decoded():
    assert pmnet.ByteTokenizer().decode([72, 400]) == "H<reserved_400>"


def test_a_tokenizer_is_as_long_as_its_ids_reach():
    for tokenizer in (pmnet.ByteTokenizer(), pmnet.ByteTokenizer(published_ids=True)):
        assert len(tokenizer) == 384
        tokenizer.add_tokens(["<t>"])
        assert tokenizer.convert_tokens_to_ids("<t>") == 384
        assert len(tokenizer) == 385


def test_pipelines_take_no_bytes_away():
    tokenizer, text = pmnet.ByteTokenizer(), " , b ) . it 's n't"
    assert tokenizer.decode(tokenizer(text)["input_ids"], clean_up_tokenization_spaces=True) == text


def test_added_tokens_may_look_like_bytes():
    tokenizer = pmnet.ByteTokenizer()
    tokenizer.add_tokens(["<0xZZ>"])
    assert tokenizer.decode([65, tokenizer.convert_tokens_to_ids("<0xZZ>"), 66]) == "A<0xZZ>B"


def test_labels_of_chosen_positions_have_the_mask_of_these(model):
    ids, mask = random_ids(1, 12), torch.tensor([[1] * 9 + [0] * 3])
    for chosen in (torch.arange(6), torch.tensor([0, 1, 2, 3, 9, 10])):
        found = model(ids, labels=ids[:, chosen], logits_to_keep=chosen, attention_mask=mask).loss
        seen = model(ids[:, :9]).logits[:, chosen[chosen < 9]]
        expected = torch.nn.functional.cross_entropy(seen[0, :5], ids[0, chosen[1:6]][: seen.shape[1]][:5])
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)


def test_an_angle_base_set_later_is_kept_when_saved(tmp_path):
    given = {"rope_theta": 500.0, "rope_type": "default"}
    config = pmnet.PMNetConfig(rope_parameters=given)
    assert config.rope_theta == 500.0
    config.rope_theta = 77.0
    config.save_pretrained(tmp_path)
    assert pmnet.PMNetConfig.from_pretrained(tmp_path).rope_theta == 77.0
    assert given == {"rope_theta": 500.0, "rope_type": "default"}


def test_a_stream_knows_several_ends_of_text():
    model = small_model("deep", eos_token_id=[258, 10, 13])
    drawn = b"".join(pmnet.stream_bytes(model, b"a", pmnet.PMNetCache(model.config), 400, temperature=100.0))
    assert len(drawn) == 400
    assert not set(drawn) & {10, 13}


def test_text_is_searched_for_special_tokens_only_where_a_call_says_so():
    tokenizer = pmnet.ByteTokenizer()
    assert tokenizer("<bos>a")["input_ids"] == [*b"<bos>a"]
    assert tokenizer("<bos>a", split_special_tokens=False)["input_ids"] == [257, 97]
