"""Training under stress: poisoned weights and data, signals, a kill, a full disk. The last good state always loads."""

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from pmnet.baselines import load_any
from pmnet.data.files import RandomWindows, open_files
from pmnet.data.streams import ContiguousWindows
from pmnet.model import PMNetForCausalLM
from pmnet.train import checkpoint, loop, progress
from pmnet.train.checkpoint import latest_checkpoint
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import TrainingInterrupted, TrainingStopped, train
from pmnet.train.recipes import RECIPES, Recipe
from pmnet.train.tasks import ByteTask
from tests.conftest import run_cli, small_config

PLAN = Recipe(model=small_config("deep"), steps=8, batch_size=2, length=16, warmup=2, checkpoint_seconds=0.0)


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.bin"
    path.write_bytes(bytes(range(256)) * 4)
    return path


def source(text, plan=PLAN):
    return ByteTask(RandomWindows(open_files([text]), plan.length, plan.batch_size, plan.seed))


def weights(run):
    return load_file(run / "model" / "model.safetensors")


def assert_same_model(one, other):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def poison_weights(model, batch):
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] = torch.nan
    batch["input_ids"][0, 0] = 0


def poison_anchors(model, batch):
    with torch.no_grad():
        model.model.memory_embeddings[1].fill_(torch.inf)


def poison_gradients(model, batch):
    model.model.norm.weight.register_hook(lambda grad: grad * torch.nan)


@pytest.mark.parametrize("poison", [poison_weights, poison_anchors, poison_gradients])
def test_poison_stops_with_a_sentence_and_the_run_goes_on_from_the_last_good_step(poison, text, tmp_path, monkeypatch):
    original, calls = loop.loss_of, []

    def poisoned(model, batch, carry):
        calls.append(1)
        if len(calls) == 5:
            poison(model, batch)
        return original(model, batch, carry)

    monkeypatch.setattr(loop, "loss_of", poisoned)
    with pytest.raises(TrainingStopped, match=r"^the (loss|norm) of step 5 is nan.*step-4$"):
        train(PLAN, source(text), tmp_path / "run")
    monkeypatch.setattr(loop, "loss_of", original)
    assert latest_checkpoint(tmp_path / "run").name == "step-4"
    train(PLAN, source(text), tmp_path / "run", resume=True)
    train(PLAN, source(text), tmp_path / "whole")
    assert_same_model(tmp_path / "run", tmp_path / "whole")


def test_ids_out_of_range_stop_with_a_sentence(text, tmp_path, monkeypatch):
    original = ContiguousWindows.batch

    def broken(self, index):
        batch = original(self, index)
        if index == 3:
            batch["input_ids"][0, 0] = 9999
        return batch

    monkeypatch.setattr(ContiguousWindows, "batch", broken)
    arguments = ["train", "--data", str(text), "--out", str(tmp_path / "run"), "--steps", "6", "--batch-size", "2"]
    code, printed = run_cli([*arguments, "--length", "16", "--checkpoint-seconds", "0", "--clip", "0"])
    assert code == 1
    assert [line for line in printed.splitlines() if line.startswith("pmnet:")] == [
        "pmnet: input_ids must lie in [0, 384), got 9999"
    ]
    assert latest_checkpoint(tmp_path / "run").name == "step-3"
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]["clip"] == 0


def test_twenty_signals_at_random_moments_change_no_bit(tmp_path, monkeypatch):
    """SIGTERM while a batch is made, in the forward pass or while the task learns its result; of a climbing ladder."""
    plan = replace(RECIPES["copy-paste"]["demo"](), model=small_config("deep", attention_dropout=0.1), steps=70,
                   batch_size=2, size=2, checkpoint_seconds=1e9)  # fmt: skip
    chance, countdown, moments = random.Random(0), [0], ["batch", "loss", "observe"]

    def task():
        ladder = build_ladder("copy-paste", plan)
        ladder.advance = 0.05
        return ladder

    train(plan, task(), tmp_path / "whole")
    moment = [""]

    def strike(where):
        if where == moment[0]:
            countdown[0] -= 1
            if countdown[0] == 0:
                os.kill(os.getpid(), signal.SIGTERM)

    def struck(function, where):
        def call(*arguments):
            strike(where)
            return function(*arguments)

        return call

    monkeypatch.setattr(loop, "loss_of", struck(loop.loss_of, "loss"))
    stops = 0
    for attempt in range(20):
        countdown[0], moment[0], ladder = chance.randint(1, 4), chance.choice(moments), task()
        ladder.batch, ladder.observe = struck(ladder.batch, "batch"), struck(ladder.observe, "observe")
        with pytest.raises(TrainingInterrupted, match="SIGTERM"):
            train(plan, ladder, tmp_path / "cut", resume=attempt > 0)
        stops += 1
        torch.manual_seed(attempt)  # whatever the next process begins with
    assert stops == 20
    assert 20 <= int(latest_checkpoint(tmp_path / "cut").name[5:]) < plan.steps
    countdown[0] = 0
    train(plan, task(), tmp_path / "cut", resume=True)
    assert_same_model(tmp_path / "cut", tmp_path / "whole")


def test_a_killed_process_resumes_to_the_same_bits(text, tmp_path):
    run = tmp_path / "run"
    arguments = ["train", "--data", str(text), "--steps", "80", "--batch-size", "2", "--length", "16"]
    process = subprocess.Popen(
        [sys.executable, "-m", "pmnet", *arguments, "--out", str(run), "--checkpoint-seconds", "0"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    while latest_checkpoint(run) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    left = latest_checkpoint(run)
    assert left is not None
    assert 1 <= int(left.name[5:]) < 80
    assert run_cli([*arguments, "--out", str(run), "--resume"])[0] == 0
    assert run_cli([*arguments, "--out", str(tmp_path / "whole")])[0] == 0
    assert_same_model(run, tmp_path / "whole")


def _full(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


def _half_written(path: Path, *arguments, **more):
    with path.open("w") as file:
        file.write('{"step":')
    _full()


class Full:
    """A disk that is full from the fifth use of one function on."""

    def __init__(self, original, instead):
        self.original, self.instead, self.uses = original, instead, 0

    def __call__(self, *arguments, **more):
        self.uses += 1
        return (self.original if self.uses < 5 else self.instead)(*arguments, **more)


@pytest.mark.parametrize("moment", ["weights", "moments", "facts", "rename", "metrics"])
def test_a_full_disk_leaves_the_last_good_checkpoint(moment, text, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        if moment == "weights":
            full = Full(PMNetForCausalLM.save_pretrained, _full)
            patch.setattr(PMNetForCausalLM, "save_pretrained", lambda *a, **k: full(*a, **k))
        elif moment == "moments":
            patch.setattr(checkpoint, "save_file", Full(checkpoint.save_file, _full))
        elif moment == "facts":
            original, full = Path.write_text, Full(Path.write_text, _half_written)

            def write(path, *arguments, **more):
                return (full if path.name == "trainer.json" else original)(path, *arguments, **more)

            patch.setattr(Path, "write_text", write)
        elif moment == "rename":
            full = Full(os.replace, _full)

            def rename(source, target):
                return (full if Path(target).name.startswith("step-") else full.original)(source, target)

            patch.setattr(os, "replace", rename)
        else:
            full = Full(progress.Reporter.step, _full)
            patch.setattr(progress.Reporter, "step", lambda *a, **k: full(*a, **k))
        with pytest.raises(OSError, match="No space left on device"):
            train(PLAN, source(text), run)
    names = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert all(name.startswith("step-") for name in names), names
    assert latest_checkpoint(run).name == names[-1]
    assert 1 <= int(names[-1][5:]) < PLAN.steps
    train(PLAN, source(text), run, resume=True)
    train(PLAN, source(text), tmp_path / "whole")
    assert_same_model(run, tmp_path / "whole")


def test_a_disk_that_is_full_at_the_very_end_keeps_the_training(text, tmp_path, monkeypatch):
    run, original = tmp_path / "run", PMNetForCausalLM.save_pretrained

    def last(model, folder, *arguments, **more):
        if Path(folder).name == "model":
            Path(folder).mkdir()
            (Path(folder) / "model.safetensors").write_bytes(b"half")
            raise SafetensorError("No space left on device")  # as the library says it
        return original(model, folder, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(PMNetForCausalLM, "save_pretrained", last)
        with pytest.raises(OSError, match=r"could not write .*model: No space left"):
            train(PLAN, source(text), run)
    assert not [path for path in run.iterdir() if "model" in path.name]
    trained = train(PLAN, source(text), run, resume=True)
    ids = torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        expected = trained(ids).logits
        assert torch.equal(load_any(run / "model")(ids).logits, expected)
    with monkeypatch.context() as patch:
        patch.setattr(PMNetForCausalLM, "save_pretrained", last)
        with pytest.raises(OSError, match="No space left"):
            train(PLAN, source(text), run, resume=True)
    with torch.no_grad():  # what was there stays
        assert torch.equal(load_any(run / "model")(ids).logits, expected)
