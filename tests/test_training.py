"""Training: learns, resumes to the bit, stops with a sentence."""

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pmnet.data.copy_paste import FILLER, LETTERS, copy_batch
from pmnet.data.files import RandomWindows, open_files
from pmnet.model.tokenizer import BOS, PAD, PASTE
from pmnet.train import loop
from pmnet.train.checkpoint import latest_checkpoint
from pmnet.train.loop import TrainingStopped, loss_of, train
from pmnet.train.recipes import COPY_PASTE, LANGUAGE_MODEL, Recipe
from pmnet.train.tasks import ByteTask, CopyCurriculum
from tests.conftest import small_config, small_model


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    (folder / "b.bin").write_bytes(bytes(range(256)))
    return folder


def recipe(**changes) -> Recipe:
    values = {"steps": 6, "batch_size": 2, "length": 24, "warmup": 2, "compile": False, "learning_rate": 3e-3}
    values["model"] = small_config("deep")
    return Recipe(**(values | changes))


def task(folder, plan: Recipe) -> ByteTask:
    return ByteTask(RandomWindows(open_files([folder]), plan.length, plan.batch_size, plan.seed))


def weights(run):
    from safetensors.torch import load_file

    return load_file(run / "model" / "model.safetensors")


def test_loss_falls_and_the_run_folder_is_complete(text, tmp_path):
    plan = recipe(steps=60, batch_size=8)
    model = train(plan, task(text, plan), tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["step"] == 60
    assert rows[-1]["loss"] < 0.7 * rows[0]["loss"]
    assert any((tmp_path / "run" / "tensorboard").iterdir())
    assert set(weights(tmp_path / "run")) <= set(model.state_dict())


@pytest.mark.parametrize("kind", ["lm", "copy-paste"])
def test_resume_equals_uninterrupted(kind, text, tmp_path, monkeypatch):
    plan = recipe(steps=8, checkpoint_seconds=1e9, model=small_config("deep", attention_dropout=0.1))

    def source():
        if kind == "lm":
            return task(text, plan)
        return CopyCurriculum(plan.model.receptive_field, 0, 4, longest=3, advance=-1.0)

    train(plan, source(), tmp_path / "whole")
    original, calls = loop.loss_of, []

    def interrupted(model, batch):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batch)

    monkeypatch.setattr(loop, "loss_of", interrupted)
    with pytest.raises(TrainingStopped, match="SIGTERM after step 5"):
        train(plan, source(), tmp_path / "cut")
    monkeypatch.setattr(loop, "loss_of", original)
    torch.manual_seed(999)
    train(plan, source(), tmp_path / "cut", resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert whole.keys() == cut.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, cut[name]), name


def test_nan_stops_with_step_and_checkpoint(text, tmp_path, monkeypatch):
    plan = recipe(steps=6, checkpoint_seconds=0.0)
    original, calls = loop.loss_of, []

    def poisoned(model, batch):
        calls.append(1)
        loss, correct = original(model, batch)
        return (loss * float("nan") if len(calls) == 4 else loss), correct

    monkeypatch.setattr(loop, "loss_of", poisoned)
    with pytest.raises(TrainingStopped, match=r"step 4: .*'loss': nan.*step-3"):
        train(plan, task(text, plan), tmp_path / "run")
    monkeypatch.setattr(loop, "loss_of", original)
    train(plan, task(text, plan), tmp_path / "run", resume=True)
    assert all(tensor.isfinite().all() for tensor in weights(tmp_path / "run").values())


def test_a_damaged_checkpoint_is_named(text, tmp_path):
    plan = recipe(steps=2)
    train(plan, task(text, plan), tmp_path / "run")
    file = latest_checkpoint(tmp_path / "run") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ValueError, match="step-2 is damaged"):
        train(plan, task(text, plan), tmp_path / "run", resume=True)
    with pytest.raises(FileExistsError, match="--resume"):
        train(plan, task(text, plan), tmp_path / "run")
    with pytest.raises(ValueError, match="nothing to resume"):
        train(plan, task(text, plan), tmp_path / "other", resume=True)


def test_another_recipe_does_not_resume(text, tmp_path):
    plan = recipe(steps=2)
    train(plan, task(text, plan), tmp_path / "run")
    other = replace(plan, learning_rate=1e-4)
    with pytest.raises(ValueError, match="another recipe"):
        train(other, task(text, other), tmp_path / "run", resume=True)


def test_a_failing_disk_loses_nothing(text, tmp_path, monkeypatch):
    from pmnet.train import checkpoint

    plan = recipe(steps=4, checkpoint_seconds=0.0)
    original, calls = checkpoint.save_file, []

    def full(*arguments, **more):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        return original(*arguments, **more)

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(OSError, match="No space left"):
        train(plan, task(text, plan), tmp_path / "run")
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-1", "step-2"]


@pytest.mark.parametrize("name", ["lm", "copy-paste"])
def test_the_training_step_compiles_without_graph_breaks(name, text):
    plan = (LANGUAGE_MODEL["tiny"] if name == "lm" else COPY_PASTE["demo"])()
    source = task(text, replace(plan, length=40)) if name == "lm" else CopyCurriculum(15, 0, 4)
    model = small_model("deep").train()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    batch = source.batch(0)
    expected, correct = loss_of(model, batch)
    got, same = compiled(model, batch)
    assert torch.allclose(expected, got, atol=1e-6)
    assert correct == same


def test_bf16_autocast_and_pure_bf16_train(text):
    plan = recipe()
    batch = task(text, plan).batch(0)
    model = small_model("deep").train()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = loss_of(model, batch)
    loss.backward()
    half = small_model("deep").to(torch.bfloat16).train()
    half_loss, _ = loss_of(half, batch)
    half_loss.backward()
    exact, _ = loss_of(small_model("deep").train(), batch)
    assert abs(loss - exact) < 0.05
    assert abs(half_loss - exact) < 0.1
    for parameter in [*model.parameters(), *half.parameters()]:
        assert parameter.grad.isfinite().all()


def test_copy_batches_are_what_they_say():
    generator = torch.Generator().manual_seed(0)
    batch = copy_batch(200, 3, (5, 9), 2, generator, width=30)
    gaps = set()
    for ids, mask, string in zip(*batch, strict=True):
        row = ids[mask == 1].tolist()
        start, paste = row.index(BOS), row.index(PASTE)
        assert row[start + 1 : start + 4] == string.tolist() == row[paste + 1 :]
        assert all(FILLER[0] <= x < FILLER[1] for x in row[:start] + row[start + 4 : paste])
        assert all(LETTERS[0] <= x < LETTERS[1] for x in string.tolist())
        assert start <= 2
        gaps.add(paste - start - 4)
        assert (ids[mask == 0] == PAD).all()
    assert gaps == {5, 6, 7, 8, 9}
    with pytest.raises(ValueError, match="needs 19 positions"):
        copy_batch(1, 3, (5, 9), 2, generator, width=18)


def test_curriculum_comes_within_reach_only_once_strings_are_grown():
    source, near, shapes = CopyCurriculum(reach=15, seed=3, longest=4), 0, set()
    for index in range(200):
        batch = source.batch(index)
        ids = batch["input_ids"]
        shapes.add(tuple(ids.shape))
        gaps = (ids == PASTE).long().argmax(1) - (ids == BOS).long().argmax(1) - 1 - source.drawn
        assert source.length == 4 or (gaps >= 15).all()
        near += bool((gaps < 15).any())
        source.observe(1.0)
    assert source.length == 4
    assert 5 < near < 60
    assert shapes == {(32, source.width - 1), (8, 4 * source.width - 1)}


def test_windows_cover_files_and_shift_labels(text):
    windows = RandomWindows(open_files([text]), 16, 64, seed=1)
    batch = windows.batch(5)
    again = windows.batch(5)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["input_ids"], windows.batch(6)["input_ids"])
    same = batch["labels"][:, :-1] != -100
    assert torch.equal(batch["input_ids"][:, 1:][same], batch["labels"][:, :-1][same])


def test_two_processes_train_one_model(text, tmp_path):
    """`torch.distributed`: two ranks on different windows end with the model of one process on both."""
    run = tmp_path / "run"
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "pmnet.cli",
        "train", "--data", str(text), "--out", str(run), "--steps", "2", "--batch-size", "2", "--length", "24",
        "--no-compile",
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-2000:]
    assert latest_checkpoint(run).name == "step-2"

    plan = replace(LANGUAGE_MODEL["tiny"](), steps=2, batch_size=2, length=24, compile=False)
    source = task(text, plan)

    class Both(ByteTask):
        def batch(self, index):
            parts = [source.batch(2 * index), source.batch(2 * index + 1)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}

    train(plan, Both(source.windows), tmp_path / "one")
    rates = [
        [json.loads(line)["rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "one")
    ]
    assert rates[0] == rates[1]
    together, alone = weights(run), weights(tmp_path / "one")
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-4), name
