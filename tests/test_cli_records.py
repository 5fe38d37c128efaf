"""What a command leaves behind: tables of what was measured, and where its numbers come from."""

import json
import platform
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from pmnet.report import provenance
from tests.conftest import run_cli, small_model

ROOT = Path(__file__).parent.parent
ROW = {"size": 8, "variant": "random", "distance": 8, "exact": 1.0, "low": 0.9, "high": 1.0, "letters": 1.0}


@pytest.fixture
def model(tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def second_time(error, found):
    """A measurement that gives `found`, and ends in `error` when it is made again."""
    made = iter([found])

    def measure(*_):
        try:
            return next(made)
        except StopIteration:
            raise error from None

    return measure


@pytest.mark.parametrize(("error", "expected"), [(KeyboardInterrupt(), 130), (RuntimeError("out of memory"), 1)])
def test_cells_that_were_measured_are_shown(model, monkeypatch, error, expected):
    monkeypatch.setattr("pmnet.cli_retrieval.measure_cell", second_time(error, {**ROW, "control": None}))
    code, printed = run_cli(["eval", "retrieval", model])
    assert code == expected
    table = printed.partition("1000 answers per cell")[2].split()
    assert table[table.index("random") :][:4] == ["random", "8", "100.0%", "90.0-100.0"]


def test_rows_that_were_read_are_shown(model, tmp_path, monkeypatch):
    (tmp_path / "book").write_bytes(b"It was a dark and stormy night. " * 40)
    row = {"total": 7.25, "word_perplexity": 1.0, "bytes_per_second": 1.0, "bits": [[7.25]], "edges": [64]}
    monkeypatch.setattr("pmnet.cli_longcontext.bits_by_position", second_time(KeyboardInterrupt(), row))
    code, printed = run_cli(["eval", "longcontext", model, "--data", str(tmp_path / "book"), "--length", "64"])
    assert code == 130
    assert "7.2500" in printed.partition("word perplexity")[2]


def test_nothing_that_was_measured_is_no_table(model, monkeypatch):
    monkeypatch.setattr("pmnet.cli_retrieval.measure_cell", lambda *_: (_ for _ in ()).throw(OSError("no")))
    assert "answers per cell" not in run_cli(["eval", "retrieval", model])[1]


def test_a_stored_command_can_be_given_again(monkeypatch):
    given = ["demo", "--string", "it's a dark night", "--seconds", "0", "--models", ""]
    monkeypatch.setattr(sys, "argv", ["pmnet", *given])
    assert shlex.split(provenance.provenance()["command"])[-len(given) :] == given


def test_the_record_of_a_run_names_the_commits_of_all_its_parts(tmp_path, monkeypatch):
    run = tmp_path / "run"
    command = ["train", "copy-paste", "--size", "1", "--steps", "1", "--batch-size", "1", "--out", str(run)]

    def record(commit, *more):
        monkeypatch.setenv("PMNET_COMMIT", commit)
        assert run_cli([*command, *more])[0] == 0
        return json.loads((run / "config.json").read_text())

    first = record("a")
    assert first["commit"] == "a"
    assert "resumed" not in first
    record("b", "--resume")
    last = record("c", "--resume")
    assert [part["commit"] for part in last.pop("resumed")] == ["b", "c"]
    assert last == first
    (run / "config.json").write_text("{")
    lost = record("d", "--resume")
    assert [part["commit"] for part in lost["resumed"]] == ["d"]
    assert lost["commit"] is None
    assert lost["recipe"] == first["recipe"]
    shutil.rmtree(run / "checkpoints")
    shutil.rmtree(run / "model")
    again = record("e")
    assert again["commit"] == "e"
    assert "resumed" not in again


@pytest.mark.parametrize(("steps", "told"), [(100, True), (101, False)])
def test_steps_within_the_warm_up_are_told(tmp_path, monkeypatch, steps, told):
    monkeypatch.setattr("pmnet.cli_train.train", lambda *_, **__: None)
    code, printed = run_cli(["train", "copy-paste", "--steps", str(steps), "--out", str(tmp_path / "run")])
    assert code == 0
    line = "100 steps end within the warm-up of 100: the learning rate never reaches 0.002"
    assert (line in printed.splitlines()) == told


def test_what_is_named_twice_is_measured_once(model, tmp_path):
    options = ["--sizes", "2,2", "--distances", "1,1", "--variants", "random,random", "--strings", "4"]
    assert run_cli(["eval", "retrieval", model, *options, "--save", str(tmp_path)])[0] == 0
    assert len(json.loads((tmp_path / "copy-paste.json").read_text())["cells"]) == 1


def test_what_is_printed_has_no_pictures(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "models" / "copy-paste", "model")
    code, printed = run_cli(["demo", "model", "--string", "a:fire:b", "--seconds", "0", "--least", "500"])
    assert code == 0, printed
    assert printed.count("'a:fire:b'") >= 2
    code, printed = run_cli(["train", "copy-paste", "--steps", "1", "--batch-size", "2", "--out", ":fire:"])
    assert code == 0, printed
    assert "model saved to :fire:/model" in printed


def test_a_run_that_goes_on_costs_what_is_left(tmp_path):
    (tmp_path / "text").write_bytes(b"Once upon a time. " * 90)
    run = tmp_path / "run"
    options = [
        "train",
        "lm",
        "--data",
        str(tmp_path / "text"),
        "--preset",
        "demo",
        "--batch-size",
        "2",
        "--length",
        "16",
    ]
    options += ["--out", str(run), "--steps", "8", "--checkpoint-seconds", "0"]
    code, printed = run_cli(options)
    assert code == 0, printed
    assert "256 bytes to read" in printed  # 2 rows of 16, eight times
    shutil.rmtree(run / "checkpoints" / "step-8")
    code, printed = run_cli([*options, "--resume"])
    assert code == 0, printed
    assert "32 bytes to read" in printed


def test_a_model_that_practised_can_be_watched(tmp_path):
    (tmp_path / "text").write_bytes(b"Once upon a time. " * 90)
    run = tmp_path / "run"
    code, printed = run_cli([
        "train", "lm", "--data", str(tmp_path / "text"), "--preset", "demo", "--batch-size", "2", "--length", "16",
        "--steps", "2", "--practice", "2", "--size", "1", "--out", str(run),
    ])  # fmt: skip
    assert code == 0, printed
    code, printed = run_cli(["demo", str(run / "model"), "--string", "a", "--seconds", "0", "--least", "100"])
    assert code == 0, printed


def test_what_is_not_finite_is_stored_as_null(tmp_path):
    provenance.write_json(tmp_path / "file.json", {"losses": [(1.5, float("nan"))], "most": float("inf")})
    assert json.loads((tmp_path / "file.json").read_text()) == {"losses": [[1.5, None]], "most": None}


FAULTS = """
import ctypes, resource
from pmnet.cli_train import _keep_freed_memory
{}
def touch():
    block = ctypes.create_string_buffer(2**26)
    ctypes.memset(block, 1, len(block))
touch()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
touch()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc alone")
def test_freed_memory_is_kept_while_training():
    def faults(first):
        command = [sys.executable, "-c", FAULTS.format(first)]
        return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)

    assert faults("_keep_freed_memory()") < faults("") // 4
