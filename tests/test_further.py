"""Training a model further: it begins with the weights of a folder, and with nothing else of it."""

import itertools
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from pmnet.baselines import control
from pmnet.model.tokenizer import EOS, PASTE
from pmnet.train.ladders import build_ladder
from pmnet.train.recipes import RECIPES
from tests.conftest import run_cli, small_config
from tests.test_cli import fails


def folder(path, name="pmnet", dtype=torch.float32, **changes):
    config = small_config("deep", **changes)
    config.auto_map = {"AutoConfig": "pmnet_config.PMNetConfig"}
    model = AutoModelForCausalLM.from_config(config if name == "pmnet" else control(name, config), dtype=dtype)
    model.save_pretrained(path)
    return path


def further(start, run, *options):
    common = ["train", "copy-paste", "--from", start, "--out", run, "--batch-size", 2, "--learning-rate", 1e-9]
    return run_cli([str(word) for word in (*common, *options)])


@pytest.mark.parametrize(
    ("name", "dtype"), [("pmnet", torch.float32), ("pmnet", torch.bfloat16), ("mamba2", torch.float32)]
)
def test_training_begins_with_the_weights_of_the_folder(name, dtype, tmp_path):
    start, run = folder(tmp_path / "start", name, dtype), tmp_path / "run"
    code, printed = further(start, run, "--steps", 2)
    assert code == 0, printed
    before, after = (load_file(path / "model.safetensors") for path in (start, run / "model"))
    assert before.keys() == after.keys()
    for key, weight in before.items():
        assert after[key].dtype == torch.float32
        torch.testing.assert_close(after[key], weight.float(), rtol=0, atol=1e-7)
    assert "auto_map" not in json.loads((run / "model" / "config.json").read_text())
    facts = json.loads((run / "config.json").read_text())
    assert facts["architecture"] == name
    assert facts["recipe"]["start"] == str(start)
    if name == "pmnet":
        assert facts["recipe"]["gap"] == small_config("deep").receptive_field


def test_window_and_grid_may_change_because_no_weight_depends_on_them(tmp_path):
    start, run = folder(tmp_path / "start"), tmp_path / "run"
    code, printed = further(start, run, "--steps", 2, "--window", 5, "--phase-bits", 9)
    assert code == 0, printed
    before, after = (load_file(path / "model.safetensors") for path in (start, run / "model"))
    for key, weight in before.items():
        torch.testing.assert_close(after[key], weight, rtol=0, atol=1e-7)
    config = small_config("deep", sliding_window=5, phase_bits=9)
    facts = json.loads((run / "config.json").read_text())
    assert (facts["model"]["sliding_window"], facts["model"]["phase_bits"]) == (5, 9)
    assert facts["recipe"]["gap"] == config.receptive_field != small_config("deep").receptive_field


@pytest.mark.parametrize(("had", "options", "expected"), [(5, (), 34), (40, (), 40), (5, ("--window", 6), 6)])
def test_a_second_half_widens_the_window_unless_told(tmp_path, had, options, expected):
    start, run = folder(tmp_path / "start", sliding_window=had), tmp_path / "run"
    code, printed = further(start, run, "--preset", "box-finish", "--steps", 1, "--size", 2, *options)
    assert code == 0, printed
    facts = json.loads((run / "config.json").read_text())
    assert facts["model"]["sliding_window"] == expected
    assert facts["recipe"]["gap"] == small_config("deep", sliding_window=expected).receptive_field


@pytest.mark.parametrize(("had", "options", "expected"), [(3, (), 32), (3, ("--slots", 3), 3), (3, ("--slots", 4), 4)])
def test_a_second_half_has_more_slots_unless_told(tmp_path, had, options, expected):
    start, run = folder(tmp_path / "start", num_memory=had, num_hidden_layers=4), tmp_path / "run"
    code, printed = further(start, run, "--preset", "box-finish", "--steps", 1, "--size", 2, *options)
    assert code == 0, printed
    assert json.loads((run / "config.json").read_text())["model"]["num_memory"] == expected


def test_a_model_with_more_slots_keeps_every_branch_of_its_tree(tmp_path):
    start, run = folder(tmp_path / "start", num_memory=2, num_hidden_layers=8, memory_write_period=2), tmp_path / "run"
    code, printed = further(start, run, "--steps", 1, "--slots", 3)
    assert code == 0, printed
    before, after = (load_file(path / "model.safetensors") for path in (start, run / "model"))
    fresh = []
    for key, weight in before.items():
        if "memory_embeddings" not in key:
            torch.testing.assert_close(after[key], weight, rtol=0, atol=1e-7)
            continue
        level = int(key[-1])
        for path in itertools.product(range(3), repeat=level + 1):
            new = after[key].flatten(0, 1)[sum(slot * 3 ** (level - i) for i, slot in enumerate(path))]
            if max(path) < 2:
                old = weight.flatten(0, 1)[sum(slot * 2 ** (level - i) for i, slot in enumerate(path))]
                torch.testing.assert_close(new, old, rtol=0, atol=1e-7)
            else:
                fresh.append(new.abs().mean())
    assert len(fresh) == 3 + 9 + 27 + 81 - 2 - 4 - 8 - 16
    assert min(fresh) > 0


def test_slots_are_not_taken_away(tmp_path):
    start = folder(tmp_path / "start", num_memory=3)
    fails(["train", "copy-paste", "--from", start, "--out", tmp_path / "run", "--slots", 2], "3 slots", "not 2")


def test_a_run_resumes_from_its_checkpoint_and_not_from_the_start(tmp_path):
    start, run = folder(tmp_path / "start"), tmp_path / "run"
    assert further(start, run, "--steps", 2)[0] == 0
    before = load_file(run / "model" / "model.safetensors")
    folder(start)  # other weights
    assert further(start, run, "--steps", 2, "--resume")[0] == 0
    after = load_file(run / "model" / "model.safetensors")
    assert all(torch.equal(after[key], weight) for key, weight in before.items())
    other = folder(tmp_path / "other")
    code, printed = further(other, run, "--steps", 2, "--resume")
    assert code == 1
    assert f"another recipe: start ({start} there, {other} here)" in printed


def test_what_cannot_be_trained_further_is_named(tmp_path):
    start, run = folder(tmp_path / "start"), tmp_path / "run"
    common = ["train", "copy-paste", "--out", run]
    fails([*common, "--preset", "box-finish"], "box-finish", "--from")
    fails([*common, "--from", tmp_path / "none"], "none is not a model")
    fails([*common, "--from", start, "--model", "llama"], "--model")
    folder(tmp_path / "mamba2", "mamba2")
    for option in (("--window", 3), ("--phase-bits", 4)):
        fails([*common, "--from", tmp_path / "mamba2", *option], option[0], "not to a mamba2")
    AutoModelForCausalLM.from_config(small_config("deep", vocab_size=256)).save_pretrained(tmp_path / "bytes")
    fails([*common, "--from", tmp_path / "bytes"], "bytes knows 256 ids", "261")
    (start / "model.safetensors").write_bytes(b"nothing")
    fails([*common, "--from", start], "start is not a complete")
    assert not run.exists()


def test_several_strings_are_asked_for_as_often_as_one(tmp_path):
    plan = replace(RECIPES["copy-paste"]["box-finish"](), batch_size=6, rounds=3, size=4)
    source = build_ladder("copy-paste", plan)
    found = [0, 0, 0]
    for index in range(600):
        batch = source.batch(index)
        pastes = (batch["input_ids"] == PASTE).sum(1)
        assert (pastes == pastes[0]).all()
        found[int(pastes[0]) - 1] += 1
        assert len(pastes) <= 6 // pastes[0]
    assert all(150 < count < 250 for count in found), found
    with pytest.raises(ValueError, match="need finish"):
        replace(RECIPES["copy-paste"]["demo"](), rounds=2)
    fails(["train", "recall", "--rounds", 2, "--out", tmp_path / "run"], "2 rounds")
    fails(["eval", "retrieval", folder(tmp_path / "m"), "--task", "recall", "--rounds", 2], "--rounds 2", "recall")


def test_the_second_half_of_the_box_asks_for_all_gaps_alike():
    plan = RECIPES["copy-paste"]["box-finish"]()
    source = build_ladder("copy-paste", replace(plan, batch_size=8))
    assert source.stages == []
    found = {"near": 0, "beyond": 0, "far": 0}
    for index in range(600):
        ids = source.batch(index)["input_ids"]
        gap = ((ids == PASTE).long().argmax(1) - (ids == EOS).long().argmax(1) - 1).max().item()
        name = "far" if len(ids) == 2 else "near" if gap <= plan.gap else "beyond"
        found[name] += 1
        source.observe(0.0)
    assert all(150 < count < 250 for count in found.values()), found
