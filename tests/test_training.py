"""Training: learns, resumes to the bit, stops with a sentence."""

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from pmnet.baselines import load_any
from pmnet.data.files import RandomWindows, open_files
from pmnet.data.streams import ContiguousWindows
from pmnet.memory import MemoryRead
from pmnet.train import loop
from pmnet.train.checkpoint import exclusive, latest_checkpoint, starting_point
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import TrainingStopped, loss_of, train
from pmnet.train.recipes import RECIPES, Recipe
from pmnet.train.tasks import ByteTask
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
    model = small_config("deep", attention_dropout=0.1)
    plan = recipe(steps=8, checkpoint_seconds=1e9, model=model, size=3, muon=kind != "lm")

    def source():
        if kind == "lm":
            return task(text, plan)
        ladder = build_ladder("copy-paste", plan)
        ladder.advance = -1.0
        return ladder

    train(plan, source(), tmp_path / "whole")
    original, calls = loop.loss_of, []

    def interrupted(model, batch, carry):
        calls.append(1)
        if len(calls) == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batch, carry)

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


def test_silent_reads_begin_with_the_model_without_reads_and_learn(text, tmp_path):
    plan = recipe(silent_reads=True, steps=1, learning_rate=1e-300)
    model = train(plan, task(text, plan), tmp_path / "still")
    read = [m for m in model.modules() if isinstance(m, MemoryRead)]
    assert all(not m.proj_out.weight.any() for m in read)
    plan = replace(plan, learning_rate=1e-2, steps=4)
    model = train(plan, task(text, plan), tmp_path / "run")
    assert all(m.proj_out.weight.any() for m in model.modules() if isinstance(m, MemoryRead))


def test_nan_stops_with_step_and_checkpoint(text, tmp_path, monkeypatch):
    plan = recipe(steps=6, checkpoint_seconds=0.0)
    original, calls = loop.loss_of, []

    def poisoned(model, batch, carry):
        calls.append(1)
        loss, correct = original(model, batch, carry)
        return (loss * float("nan") if len(calls) == 4 else loss), correct

    monkeypatch.setattr(loop, "loss_of", poisoned)
    with pytest.raises(TrainingStopped, match=r"^the loss of step 4 is nan.*step-3"):
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


def test_a_clip_of_zero_clips_nothing(text, tmp_path):
    found = []
    for clip in (0.0, 1e30):
        plan = recipe(steps=3, clip=clip)
        found.append(train(plan, task(text, plan), tmp_path / str(clip)).state_dict())
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_weights_that_are_not_finite_are_never_saved(text, tmp_path):
    plan = recipe(steps=1, learning_rate=1e300)
    with pytest.raises(TrainingStopped, match="step 1 left weights that are not finite; last good checkpoint: none"):
        train(plan, task(text, plan), tmp_path / "run")
    assert not list((tmp_path / "run").rglob("*.safetensors"))


def test_another_recipe_does_not_resume(text, tmp_path):
    plan = recipe(steps=2)
    train(plan, task(text, plan), tmp_path / "run")
    other = replace(plan, learning_rate=1e-4)
    with pytest.raises(ValueError, match="another recipe"):
        train(other, task(text, other), tmp_path / "run", resume=True)
    other = replace(plan, model=small_config("deep", phase_bits=9))
    with pytest.raises(ValueError, match="another model"):
        train(other, task(text, other), tmp_path / "run", resume=True)
    assert not torch.are_deterministic_algorithms_enabled()
    again = replace(plan, checkpoint_seconds=1.0)  # how often it is saved is nothing to the run
    train(again, task(text, again), tmp_path / "run", resume=True)
    (text / "b.bin").unlink()
    with pytest.raises(ValueError, match="another set of files"):
        train(plan, task(text, plan), tmp_path / "run", resume=True)


def test_another_number_of_processes_does_not_resume(text, tmp_path):
    plan = recipe(steps=2)
    train(plan, task(text, plan), tmp_path / "run")
    with pytest.raises(ValueError, match="another number of processes"):
        starting_point(tmp_path / "run", True, plan.plan() | {"number of processes": 2})


def test_one_process_trains_in_a_folder(tmp_path):
    run = tmp_path / "run"
    for _ in range(2):
        with exclusive(run), pytest.raises(ValueError, match="another process"), exclusive(run):
            pass


def test_a_checkpoint_without_a_field_is_named(text, tmp_path):
    plan = recipe(steps=1)
    train(plan, task(text, plan), tmp_path / "run")
    facts = latest_checkpoint(tmp_path / "run") / "trainer.json"
    stored = json.loads(facts.read_text())
    del stored["bytes"]
    facts.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=r"step-1 is damaged: .*bytes"):
        train(plan, task(text, plan), tmp_path / "run", resume=True)


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
    plan = next(iter(RECIPES[name].values()))()
    source = task(text, replace(plan, length=40)) if name == "lm" else build_ladder(name, plan)
    model = small_model("deep").train()
    compiled = torch.compile(loss_of, fullgraph=True, backend="aot_eager")
    batch = source.batch(0)
    expected, correct = loss_of(model, batch)
    got, same = compiled(model, batch)
    assert torch.allclose(expected, got, atol=1e-6)
    assert correct == same


def test_a_model_trained_under_autocast_is_the_one_that_was_saved(text, tmp_path):
    plan = recipe(steps=1, precision="bf16")
    model, ids = train(plan, task(text, plan), tmp_path / "run"), torch.arange(20).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids).logits, load_any(tmp_path / "run" / "model")(ids).logits)


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


def test_three_processes_train_one_model(text, tmp_path):
    """`torch.distributed`: three ranks on two lanes each end with the model of one process on six."""
    run = tmp_path / "run"

    def launch(*options):
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3", "-m", "pmnet",
            "train", "--data", str(text), "--out", str(run), "--steps", "2", "--batch-size", "2", "--length", "24",
            "--learning-rate", "0.002", "--checkpoint-seconds", "0", *options,
        ]  # fmt: skip
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-2000:]
        assert latest_checkpoint(run).name == "step-2"
        return weights(run)

    together = launch()
    shutil.rmtree(run / "checkpoints" / "step-2")  # every rank continues its own rows from step 1
    for name, tensor in launch("--resume").items():
        assert torch.equal(together[name], tensor), name

    plan = replace(RECIPES["lm"]["tiny"](), steps=2, batch_size=6, length=24, learning_rate=2e-3)
    train(plan, ByteTask(ContiguousWindows(open_files([text]), 24, 6, plan.seed)), tmp_path / "one")
    three, one = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (run, tmp_path / "one")
    )
    assert [row["rate"] for row in three] == [row["rate"] for row in one]
    for name in ("loss", "correct"):  # means over all ranks; the first step has the same weights
        assert three[0][name] == pytest.approx(one[0][name], rel=1e-5)
    alone = weights(tmp_path / "one")
    for name, tensor in alone.items():
        assert torch.allclose(together[name], tensor, atol=1e-4), name


def test_two_processes_train_a_traced_step(tmp_path):
    """What averages their gradients breaks the graph; with the compiler that only traces, which is quick."""
    script, run = tmp_path / "traced.py", tmp_path / "run"
    script.write_text(
        "import torch\ncompiled = torch.compile\n"
        "torch.compile = lambda *a, **k: compiled(*a, backend='eager', **k)\n"
        "import runpy\nrunpy.run_module('pmnet', run_name='__main__')\n"
    )
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(script), "train",
        "copy-paste", "--compile", "--steps", "2", "--batch-size", "2", "--out", str(run),
    ]  # fmt: skip
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["step"] == 2
