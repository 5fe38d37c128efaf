"""What can go wrong around a run: signals to its helpers, folders in the way, places that cannot be written to."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from pmnet.data.files import RandomWindows, open_files
from pmnet.train.progress import Reporter
from pmnet.train.tasks import ByteTask
from tests.conftest import run_cli, small_model
from tests.test_cli import fails

TRAIN = ["--batch-size", "2", "--length", "16", "--no-compile"]


def same_files(a, b):
    for name in ("model.safetensors", "optimizer.safetensors"):
        one, other = load_file(a / name), load_file(b / name)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_signal_to_the_whole_group_leaves_a_checkpoint(books, tmp_path):
    run = tmp_path / "run"
    options = ["--preset", "demo", "--steps", "100000", "--workers", "2", "--out", str(run), *TRAIN]
    command = [sys.executable, "-m", "pmnet", "train", "--data", str(books), *options]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        deadline = time.monotonic() + 240
        while not ((run / "metrics.jsonl").exists() and (run / "metrics.jsonl").stat().st_size):
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(process.pid, signal.SIGTERM)
        _, printed = process.communicate(timeout=240)
    finally:
        process.kill()
    assert process.returncode == 130
    assert b"Traceback" not in printed
    assert len(list((run / "checkpoints").glob("step-*"))) == 1


def test_a_reader_that_was_killed_is_named(books):
    task = ByteTask(RandomWindows(open_files([books]), 16, 2, 1), workers=1)
    before = torch.get_rng_state()
    task.batch(0)
    assert torch.equal(torch.get_rng_state(), before)  # of dropout, which is saved with a checkpoint
    reader = task.ahead._workers[0]
    os.kill(reader.pid, signal.SIGKILL)
    os.waitid(os.P_PID, reader.pid, os.WEXITED | os.WNOWAIT)  # interrupts nothing: it is named where a batch is wanted
    with pytest.raises(OSError, match="a process that reads files ahead has ended"):
        all(map(task.batch, range(1, 100)))


@pytest.mark.parametrize("error", [EOFError(), ConnectionResetError(), RuntimeError("DataLoader worker (pid 1) ended")])
def test_a_reader_that_was_killed_at_any_moment_is_named(books, error):
    def ended():
        raise error
        yield

    task = ByteTask(RandomWindows(open_files([books]), 16, 2, 1), workers=1)
    task.batch(0)
    task.ahead = ended()
    with pytest.raises(OSError, match="a process that reads files ahead has ended"):
        task.batch(1)


def test_a_file_that_changes_is_named_by_a_reader_too(books):
    task = ByteTask(RandomWindows(open_files([books]), 16, 2, 1), workers=1)
    for path in books.iterdir():
        path.write_bytes(b"a")
    with pytest.raises(OSError, match=r"^OSError: .*changed while it was being read") as raised:
        all(map(task.batch, range(20)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_dropout_is_resumed_to_the_bit(books, tmp_path, workers):
    model = small_model("deep", attention_dropout=0.2)
    model.save_pretrained(tmp_path / "model")
    common = ["train", "--data", str(books), "--preset", "demo", "--from", str(tmp_path / "model"), *TRAIN]
    common += ["--workers", workers, "--carry"]
    assert run_cli([*common, "--steps", "8", "--checkpoint-seconds", "0", "--out", str(tmp_path / "whole")])[0] == 0
    cut = tmp_path / "cut"
    assert run_cli([*common, "--steps", "8", "--checkpoint-seconds", "0", "--out", str(cut)])[0] == 0
    newest = max((cut / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    (newest / "trainer.json").unlink()  # the run stopped while it wrote the last one
    assert run_cli([*common, "--steps", "8", "--checkpoint-seconds", "0", "--out", str(cut), "--resume"])[0] == 0
    same_files(cut / "checkpoints" / "step-8", tmp_path / "whole" / "checkpoints" / "step-8")


def test_a_model_is_not_overwritten_by_a_run(books, tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    weights = (tmp_path / "model" / "model.safetensors").read_bytes()
    common = ["train", "--data", books, "--steps", 2, *TRAIN]
    fails([*common, "--from", tmp_path / "model", "--out", tmp_path / "model"], "would overwrite")
    fails([*common, "--preset", "demo", "--out", tmp_path], "would overwrite")
    assert (tmp_path / "model" / "model.safetensors").read_bytes() == weights
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_does_not_read_itself(books):
    fails(["train", "--data", books, "--steps", 2, "--out", books / "runs" / "a", *TRAIN], "lies in the data")
    assert not (books / "runs").exists()


def test_linked_folders_are_read_once(books, tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "there").symlink_to(books)
    (books / "back").symlink_to(tmp_path / "links")  # a circle
    assert {path.name for path in open_files([tmp_path / "links"]).paths} == {f"{name}.txt" for name in "abcdef"}
    assert len(open_files([tmp_path / "links"]).paths) == 6


def test_too_much_memory_is_one_sentence(tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    options = ["--steps", 2, "--batch-size", 10**12, "--out", tmp_path / "run"]
    fails(["train", "copy-paste", *options], "not enough memory", "smaller batches")


@pytest.mark.parametrize("command", ["longcontext", "bits", "retrieval"])
def test_a_place_that_cannot_be_saved_to_is_refused_before_the_work(books, tmp_path, command):
    small_model("deep").save_pretrained(tmp_path / "model")
    place = books if command == "bits" else books / "a.txt"
    data = [] if command == "retrieval" else ["--data", str(books)]
    code, printed = run_cli(["eval", command, str(tmp_path / "model"), *data, "--save", str(place)])
    assert code == 2
    assert "--save" in printed
    assert "bits per byte" not in printed


def test_foreign_metrics_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for foreign in ('{"a": 1}', "{broken}", "[1]}"):
        path.write_text(json.dumps({"step": 1}) + "\n" + foreign + "\n")
        with pytest.raises(ValueError, match=r"line 2 of .*metrics\.jsonl"):
            Reporter(tmp_path, 10, 5)
    path.write_text('{"step": 1}\n{"step": 7}\n{"step": 2')
    Reporter(tmp_path, 10, 5).close()
    assert path.read_text() == '{"step": 1}\n'


def test_names_and_seeds_out_of_range(tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "tokenizer_config.json").write_text("[]")
    fails(["export", tmp_path / "model"], "tokenizer_config.json is damaged")
    fails(["eval", "gradients", "jacobian", "--models", " ,", "--save", tmp_path / "why"], "no models")
    code, printed = run_cli(["eval", "retrieval", str(tmp_path / "model"), "--seed", str(2**32)])
    assert code == 2
    assert "--seed" in printed


@pytest.mark.parametrize("empty", [["--data", ""], ["--data="], ["--from", ""], ["--out", ""]])
def test_a_variable_that_was_never_set_is_not_the_current_folder(tmp_path, monkeypatch, empty):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a" * 1000)
    code, printed = run_cli(["train", "--steps", "1", *TRAIN, "--data", "a.txt", *empty])
    assert code == 2
    assert f"{empty[0].removesuffix('=')} is empty" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
