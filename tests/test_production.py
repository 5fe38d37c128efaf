"""What goes wrong around a training or a measurement: other people's files, full disks, links, signals, odd grids."""

import os
import signal
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from pmnet.baselines import LSTMConfig, LSTMForCausalLM
from pmnet.data.files import RandomWindows, open_files
from pmnet.data.streams import ContiguousWindows
from pmnet.eval.suite import grid
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import TrainingInterrupted, train
from pmnet.train.optimizers import build_schedule
from pmnet.train.progress import Reporter
from pmnet.train.recipes import RECIPES
from tests.conftest import run_cli, small_model
from tests.test_cli import fails


@pytest.fixture
def books(tmp_path):
    folder = tmp_path / "books"
    folder.mkdir()
    for name in "abc":
        (folder / name).write_bytes(f"{name}: it was a dark and stormy night. ".encode() * 60)
    return folder


def test_a_run_overwrites_nothing_that_is_not_its_own(tmp_path):
    for name, inside in (("code", "model/net.py"), ("settings", "config.json")):
        file = tmp_path / name / inside
        file.parent.mkdir(parents=True)
        file.write_text('{"mine": 1}')
        short = ["--steps", "1", "--batch-size", "1", "--size", "1", "--out", tmp_path / name]
        fails(["train", "copy-paste", *short], "would overwrite", inside.split("/")[0])
        assert file.read_text() == '{"mine": 1}'


def test_practice_beside_a_carried_state_resumes_after_the_first_step(books, tmp_path, monkeypatch):
    command = ["train", "--data", books, "--preset", "demo", "--batch-size", 3, "--length", 32, "--practice", 2,
               "--steps", 3]  # fmt: skip
    command = list(map(str, command))
    original = Reporter.step

    def stopped(self, row, *arguments):
        original(self, row, *arguments)
        if row["step"] == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(Reporter, "step", stopped)
        assert run_cli([*command, "--out", str(tmp_path / "cut")])[0] == 130
    assert run_cli([*command, "--out", str(tmp_path / "cut"), "--resume"])[0] == 0
    assert run_cli([*command, "--out", str(tmp_path / "whole")])[0] == 0
    weights = [(tmp_path / name / "model" / "model.safetensors").read_bytes() for name in ("cut", "whole")]
    assert weights[0] == weights[1]


def test_hanging_up_leaves_a_checkpoint_and_rates_are_those_of_their_step(tmp_path, monkeypatch):
    plan = replace(RECIPES["copy-paste"]["demo"](), steps=9, batch_size=1, warmup=5)
    original, rates = Reporter.step, {}

    def hung_up(self, row, *arguments):
        original(self, row, *arguments)
        rates[row["step"]] = row["rate"]
        if row["step"] == 2:
            os.kill(os.getpid(), signal.SIGHUP)

    monkeypatch.setattr(Reporter, "step", hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may have been started with nohup
    try:
        with pytest.raises(TrainingInterrupted, match="SIGHUP after step 2"):
            train(plan, build_ladder("copy-paste", plan), tmp_path / "run")
    finally:
        signal.signal(signal.SIGHUP, before)
    assert (tmp_path / "run" / "checkpoints" / "step-2" / "trainer.json").exists()
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=plan.learning_rate)
    schedule = build_schedule(optimizer, plan)
    for step in (1, 2):
        assert rates[step] == optimizer.param_groups[0]["lr"]
        optimizer.step()
        schedule.step()


def test_a_compiled_ladder_does_not_compile_for_every_stage(tmp_path, monkeypatch):
    graphs, compiled = [], torch.compile

    def counting(graph, _):
        graphs.append(graph)
        return graph.forward

    with monkeypatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **options: compiled(function, backend=counting, **options))
        plan = replace(RECIPES["copy-paste"]["demo"](), steps=40, batch_size=2, compile=True)
        train(plan, build_ladder("copy-paste", plan), tmp_path / "run")
    torch._dynamo.reset()
    assert 1 < len(graphs) <= 8
    with pytest.raises(ValueError, match="without a carried state"):
        replace(RECIPES["lm"]["tiny"](), compile=True)


def test_linked_folders_are_read_once_and_dangling_links_are_named(books, tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("one", "two"):
        (tmp_path / "data" / name).symlink_to(books)
    assert len(open_files([tmp_path / "data"]).paths) == 3
    (tmp_path / "data" / ".store").mkdir()
    (tmp_path / "data" / ".store" / "hidden").write_text("what a visible link names is read")
    (tmp_path / "data" / "visible").symlink_to(".store")
    assert [path.name for path in open_files([tmp_path / "data"]).paths].count("hidden") == 1
    (tmp_path / "data" / "gone").symlink_to(tmp_path / "unmounted" / "book")
    with pytest.raises(FileNotFoundError, match="gone is a link to nothing"):
        open_files([tmp_path / "data"])


def test_other_contents_of_the_same_size_are_another_set_of_files(books):
    before = open_files([books]).digest
    text = (books / "b").read_bytes()
    (books / "b").write_bytes(text[:-1] + b"!")
    assert open_files([books]).digest != before
    (books / "b").write_bytes(text)
    assert open_files([books]).digest == before


def test_documents_begin_with_the_bos_of_the_model(books):
    files = open_files([books])
    for first in (254, 257):
        windows = ContiguousWindows(files, 64, 2, 0, first=first)
        ids = torch.cat([windows.batch(index)["input_ids"] for index in range(windows.steps)])
        assert int((ids == first).sum()) == 3
        ids = RandomWindows(files, 5000, 8, 0, first).batch(0)["input_ids"]
        assert (ids[:, 0] == first).all()


def test_models_in_half_precision_and_without_a_bos_are_measured(books, tmp_path):
    small_model("deep").bfloat16().save_pretrained(tmp_path / "half")
    LSTMForCausalLM(LSTMConfig(hidden_size=8)).save_pretrained(tmp_path / "lstm")
    common = ["--data", str(books), "--length", "200"]
    assert run_cli(["eval", "longcontext", str(tmp_path / "half"), *common])[0] == 0
    assert run_cli(["eval", "longcontext", str(tmp_path / "lstm"), *common, "--reset", "33"])[0] == 0


def test_grids_have_no_distances_that_are_not_measured():
    with pytest.raises(ValueError, match="recall has no distances"):
        grid("recall", 15, distances=["1", "1000"])
    with pytest.raises(ValueError, match="those of selective-copy are blank, got 'random'"):
        grid("selective-copy", 15, variants=["random"])
    cells = grid("needle", 15, [1024], ["number", "keys", "variables"])
    assert [cell.variant for cell in cells] == ["number"] * 10 + ["keys", "variables"]


def test_a_single_letter_is_told_to_be_exact(tmp_path, monkeypatch):
    model = small_model("deep")
    model.config.task_specific_params = {"copy-paste": {"size": 4}}
    model.save_pretrained(tmp_path / "model")
    monkeypatch.setattr("pmnet.cli_demo.answer", lambda *_: b"x")
    code, printed = run_cli(["demo", str(tmp_path / "model"), "--string", "x", "--seconds", "0", "--least", "0"])
    assert code == 0
    assert printed.count("exact") == 2


def test_odd_numbers_are_named():
    for option, value in (("--lengths", "inf"), ("--lengths", "0.5"), ("--lengths", "abc"), ("--rates", "0,1")):
        fails(["eval", "gradients", "training", option, value], option, repr(value))


def test_a_thread_trains_and_leaves_the_settings_of_its_caller(tmp_path):
    plan = replace(RECIPES["copy-paste"]["demo"](), steps=1, batch_size=2, size=2)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        with ThreadPoolExecutor() as pool:
            pool.submit(train, plan, build_ladder("copy-paste", plan), tmp_path / "run").result()
        assert torch.get_deterministic_debug_mode() == 1
    finally:
        torch.use_deterministic_algorithms(False)
    assert (tmp_path / "run" / "model").is_dir()


def test_a_checkpoint_without_an_untied_head_is_incomplete(tmp_path):
    plan = replace(RECIPES["copy-paste"]["demo"](), steps=1, batch_size=1)
    plan.model.tie_word_embeddings = False
    train(plan, build_ladder("copy-paste", plan), tmp_path / "run")
    file = tmp_path / "run" / "checkpoints" / "step-1" / "model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor for name, tensor in tensors.items() if name != "lm_head.weight"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match="1 weights missing"):
        train(plan, build_ladder("copy-paste", plan), tmp_path / "run", resume=True)


def test_a_file_is_read_once_however_it_is_spelled(tmp_path, monkeypatch):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one").write_text("one")
    (tmp_path / "texts" / "same").symlink_to("one")
    monkeypatch.chdir(tmp_path)
    files = open_files([Path("texts"), tmp_path / "texts", Path("texts/../texts/one")])
    assert files.paths == (Path("texts/one"),)


@pytest.mark.parametrize(("name", "change", "told"), [
    ("0.0.exp_avg", lambda tensor: tensor[:1], "0.0.exp_avg is ["),
    ("0.0.exp_avg", None, "0.0 lacks exp_avg"),
    ("random", lambda tensor: tensor[:8], "random state has"),
])  # fmt: skip
def test_a_checkpoint_of_other_moments_is_refused(books, tmp_path, name, change, told):
    out = ["--out", str(tmp_path / "run")]
    train = ["train", "--preset", "demo", "--steps", "2", "--batch-size", "2", "--length", "16", "--data", str(books)]
    assert run_cli([*train, *out])[0] == 0
    file = tmp_path / "run" / "checkpoints" / "step-2" / "optimizer.safetensors"
    tensors = load_file(file)
    tensor = tensors.pop(name)
    if change is not None:
        tensors[name] = change(tensor).clone()
    save_file(tensors, file)
    fails([*train, *out, "--resume"], told)
