"""Measuring retrieval: scores, controls, the inspector, the live demo, a model folder that stands alone."""

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import PreTrainedConfig

import pmnet
from pmnet.cli_demo import answer
from pmnet.data.tasks import CopyPaste, Recall, SelectiveCopy
from pmnet.eval.ablate import recurrence_off
from pmnet.eval.mechanism import mechanism
from pmnet.eval.retrieval import answers, measure, wilson
from pmnet.eval.suite import grid, measure_cell
from pmnet.model.export import export_code
from pmnet.model.load import load_model
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import train
from pmnet.train.optimizers import build_optimizers
from pmnet.train.recipes import RECIPES
from tests.conftest import random_ids, run_cli, small_model


class Oracle(torch.nn.Module):
    """Answers copy-paste by looking back `distance` columns; wrong in the columns `wrong`."""

    config = PreTrainedConfig()

    def __init__(self, distance, wrong=()):
        super().__init__()
        self.distance, self.wrong, self.device = distance, wrong, torch.device("cpu")

    def forward(self, ids, **_):
        shifted = torch.roll(ids, self.distance - 1, dims=1)
        shifted[:, list(self.wrong)] += 1
        return type("Output", (), {"logits": torch.nn.functional.one_hot(shifted % 384, 384).float()})


def test_scores_count_bytes_and_strings():
    problem = CopyPaste((4, 4), (10, 10))  # COPY, 4 letters, EOS, 10 bytes, PASTE at 16
    right = measure(Oracle(16), problem, strings=6, seed=0, rows=4)
    assert (right.exact, right.letters, right.strings) == (1.0, 1.0, 6)
    one = measure(Oracle(16, wrong=[17]), problem, strings=6, seed=0, rows=4)
    assert one.exact == 0.0
    assert one.letters == pytest.approx(3 / 4)  # EOS is not counted
    assert (one.low, one.high) == wilson(0, 6)
    assert one.places == (1, 0, 1, 1, 1)
    mixed = CopyPaste((1, 4), (10, 10))  # answers of other lengths are counted where they have a byte
    assert len(measure(Oracle(3), mixed, strings=40, seed=0, rows=2).places) == 5
    assert measure(Oracle(3), problem, strings=50, seed=0).letters < 0.1


def test_intervals_are_those_of_wilson():
    low, high = wilson(0, 10)
    assert low == 0.0
    assert high == pytest.approx(0.2775, abs=1e-4)
    assert wilson(1000, 1000)[0] == pytest.approx(0.99617, abs=1e-5)
    for trials in range(1, 2000, 7):
        for hits in (0, 1, trials - 1, trials):
            low, high = wilson(hits, trials)
            assert 0.0 <= low <= hits / trials <= high <= 1.0
    assert wilson(50, 100) == pytest.approx((0.4038, 0.5962), abs=1e-4)


@pytest.mark.parametrize("problem", [CopyPaste((3, 3), (3000, 3000)), Recall(64, 4), SelectiveCopy(4, 64)], ids=str)
def test_streamed_scores_are_those_of_one_pass_and_of_generation(problem, shape):
    model = small_model(shape)
    episodes = problem.draw(3, torch.Generator().manual_seed(0))
    ids, scored = episodes.dense()
    with torch.no_grad():
        chosen = model(ids[:, :-1], use_cache=False).logits.argmax(-1)
    expected = (chosen == ids[:, 1:])[scored[:, 1:]].view(3, -1)
    found, asked = answers(model, episodes)
    assert torch.equal(found, expected)
    assert torch.equal(asked, ids[scored].view(3, -1))
    if isinstance(problem, CopyPaste):
        with torch.no_grad():
            written = model.generate(ids[:, :-4], max_new_tokens=4, do_sample=False, eos_token_id=None)[:, -4:]
        assert torch.equal((written == ids[:, -4:]).all(1), expected.all(1))


def test_the_control_is_the_same_model_without_recurrence():
    model = small_model("deep")
    cell = next(c for c in grid("copy-paste", model.config.receptive_field, [2], ["random"], ["2x"]))
    row = measure_cell(model, cell, 5, 0, 5, control=True)
    with recurrence_off(model):
        assert row["control"] == measure(model, cell.problem, 5, 0, 5).facts()
    assert model.config.memory_cumsum
    assert measure_cell(model, cell, 5, 0, 5, control=False)["control"] is None


def test_the_inspector_measures_what_it_says(monkeypatch):
    model = small_model("period")
    found = mechanism(model, length=3, gap=50, strings=4, drift=3000, seed=0)
    assert all(0 <= share <= 1 for share in found["right"])
    for level in found["levels"]:
        assert len(level["places"]) == len(found["right"]) == 3
        assert sum(place["turned"] for place in level["places"]) / 3 == pytest.approx(level["letters"]["turned"])
        for place in level["places"]:
            assert place["group"] < level["groups"]
            assert place["slot"] < model.config.num_memory
            assert 1 / 4 <= place["share"] <= 1
            assert 0 < place["weight"] < 1
    assert found["without"]["nothing"]["letters"] == pytest.approx(sum(found["right"]) / 3)
    json.dumps(found)
    with monkeypatch.context() as patched:  # some rows at a time
        patched.setattr("pmnet.eval.mechanism.columns_at_once", lambda rows: 3)
        assert mechanism(model, length=3, gap=50, strings=4, drift=3000, seed=0) == found
    assert len(found["levels"]) == 2
    root, leaf = found["levels"]
    assert root["groups"] == root["letters"]["groups_visited"] == 1
    assert root["same_group"] == 1.0
    assert leaf["letters"]["groups_effective"] <= 4.0001
    assert len(root["same_slot"]) == 2  # reads of the level
    assert set(found["without"]) == {"nothing", "state 0", "state 1", "anchors 0", "anchors 1"}
    for module in model.modules():  # writes that turn nothing leave no trace, and the inspector says so
        if isinstance(module, pmnet.model.modeling.PMNetBlock) and module.memory_write_module is not None:
            for parameter in module.memory_write_module.proj_out.parameters():
                parameter.data.zero_()
    still = mechanism(model, length=3, gap=50, strings=4, drift=3000, seed=0)
    assert all(place["turned"] == 0 for level in still["levels"] for place in level["places"])
    for level in still["levels"]:
        assert level["drift_phases"] == level["filler"]["turned"] == level["letters"]["turned"] == 0.0


def test_the_inspector_leaves_the_model_as_it_was():
    model = small_model("deep")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    mechanism(model, length=2, gap=40, strings=2, drift=100, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not any(module._forward_hooks for module in model.modules())


def trained(folder):
    plan = replace(RECIPES["copy-paste"]["demo"](), steps=2, batch_size=2)
    plan.model.task_specific_params = {"copy-paste": {"size": 8}}
    train(plan, build_ladder("copy-paste", plan), folder)
    return folder / "model"


def test_the_live_demo_runs_and_names_bad_strings(tmp_path):
    model = trained(tmp_path)
    arguments = ["demo", str(model), "--seconds", "0", "--least", "3000"]
    code, printed = run_cli([*arguments, "--string", "abc"])
    assert code == 0
    assert "3,072 bytes of random filler" in printed
    assert "'abc'" in printed
    assert printed.count("exact") + printed.count("wrong") == 2
    for string, word in (("", "1 to 8 bytes"), ("far too long", "1 to 8 bytes")):
        code, printed = run_cli([*arguments, "--string", string])
        assert code == 1
        assert word in printed
    small_model("deep").save_pretrained(tmp_path / "other")
    code, printed = run_cli(["demo", str(tmp_path / "other"), "--string", "a"])
    assert code == 1
    assert "was not trained on copy-paste" in printed


def test_the_demo_reads_up_to_the_end_marker():
    model = small_model("deep")
    with torch.no_grad():
        assert len(answer(model, pmnet.PMNetCache(model.config), 5)) <= 5


def test_eval_memory_stores_its_findings(tmp_path):
    model = trained(tmp_path)
    arguments = ["eval", "memory", str(model), "--size", "2", "--strings", "3", "--drift", "500", "--gap", "40"]
    code, printed = run_cli([*arguments, "--save", str(tmp_path / "out")])
    assert code == 0
    assert "the whole model: " in printed
    stored = json.loads((tmp_path / "out" / "memory.json").read_text())
    assert {"levels", "without", "commit", "command"} <= set(stored)
    assert stored["gap"] == 40
    assert stored["model"] == json.loads(json.dumps(load_model(model).config.to_dict()))
    assert (tmp_path / "out" / "memory.png").read_bytes().startswith(b"\x89PNG")


def test_the_progress_of_eval_memory_ends_at_its_total(tmp_path):
    seen, totals = 0, set()

    def advance(count, total):
        nonlocal seen
        seen += count
        totals.add(total)

    mechanism(load_model(trained(tmp_path)), 2, 40, 3, 500, 0, advance)
    assert {seen} == totals


def test_muon_gets_the_linear_maps_and_nothing_else():
    plan = RECIPES["copy-paste"]["demo"]()
    model = pmnet.PMNetForCausalLM(plan.model)
    adamw, muon = build_optimizers(model, plan)
    names = {parameter: name for name, parameter in model.named_parameters()}
    ours = {names[p] for group in muon.param_groups for p in group["params"]}
    rest = {names[p] for group in adamw.param_groups for p in group["params"]}
    assert ours | rest == set(names.values())
    assert not ours & rest
    assert all("proj" in name for name in ours)
    assert {"model.embed_tokens.weight", "model.memory_embeddings.0", "model.norm.weight"} <= rest
    assert len(build_optimizers(model, replace(plan, muon=False))) == 1


ALONE = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "pmnet":
            raise ImportError("pmnet is not installed here")
sys.meta_path.insert(0, Refuse())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
ids = torch.randint(0, 256, (2, 40), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    torch.save(model(ids).logits, sys.argv[2])
batch = tokenizer(["a", "abc"], return_tensors="pt", padding=True)
other = AutoModelForCausalLM.from_pretrained(sys.argv[3], trust_remote_code=True).eval()  # the operators of both stay
other(ids, labels=ids).loss.backward()
model(ids, labels=ids).loss.backward()
print(tokenizer.batch_decode(model.generate(**batch, max_new_tokens=3, do_sample=False)))
"""


def test_a_model_folder_works_without_this_package(tmp_path, monkeypatch):
    model, folder = small_model("period"), tmp_path / "model"
    model.save_pretrained(folder)
    with pytest.raises(FileNotFoundError, match=r"tokenizer_config\.json"):
        export_code(folder)
    assert not list(folder.glob("*.py"))
    pmnet.ByteTokenizer().save_pretrained(folder)
    assert run_cli(["export", str(folder)])[0] == 0
    text = "".join(path.read_text() for path in folder.glob("*.py"))
    assert not re.search(r"^\s*(from|import) pmnet\b", text, re.M)
    copy, second = tmp_path / "elsewhere", tmp_path / "sécond (v2)"
    for target in (copy, second):
        shutil.copytree(folder, target)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    command = [sys.executable, "-c", ALONE, str(copy), str(tmp_path / "logits.pt"), str(second)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    ids = random_ids(2, 40)
    with torch.no_grad():
        expected = model(ids).logits
        batch = pmnet.ByteTokenizer()(["a", "abc"], return_tensors="pt", padding=True)
        written = pmnet.ByteTokenizer().batch_decode(model.generate(**batch, max_new_tokens=3, do_sample=False))
    assert torch.allclose(torch.load(tmp_path / "logits.pt", weights_only=True), expected, atol=1e-5)
    assert str(written) in done.stdout
    pmnet.PMNetForCausalLM.from_pretrained(folder)  # and as before with it
