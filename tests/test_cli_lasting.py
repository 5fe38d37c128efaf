"""What a command has measured or read is kept, whoever listens; what it opens may be anybody's."""

import json
import os
import subprocess
import sys

import pytest

from pmnet import PMNetCache
from pmnet.report.console import Meter
from tests.conftest import run_cli, small_model
from tests.test_cli import fails


@pytest.fixture
def model(tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def into_nothing(*arguments):
    """The exit status of a command whose output is closed before it begins to speak."""
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "pmnet", *map(str, arguments)]
    with open(writing, "wb") as closed:
        return subprocess.run(command, stdout=closed, stderr=subprocess.DEVNULL, check=False).returncode


def test_a_measurement_is_stored_though_nobody_reads(model, tmp_path):
    (tmp_path / "text").write_bytes(b"some text " * 30)
    assert into_nothing("eval", "bits", model, "--data", tmp_path / "text", "--save", tmp_path / "bits.json") != 0
    assert json.loads((tmp_path / "bits.json").read_text())["bytes"] == 300


def test_a_state_is_saved_though_nobody_reads(model, tmp_path):
    state = tmp_path / ("x" * 240 + ".safetensors")[-255:]
    assert into_nothing("generate", model, "--prompt", "some text", "--bytes", 40, "--save-state", state) != 0
    assert PMNetCache.load(state).columns >= len(" some text")


def test_a_measurement_tells_how_far_it_is(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("pmnet.report.console.time.monotonic", lambda: now[0])
    with Meter() as meter:
        advance = meter.task("reading", 1000)
        advance(100)
        assert capsys.readouterr().err == ""
        now[0] = 11.0
        advance(400)
        meter.line("done: [red] 1.5")
    assert capsys.readouterr().err.splitlines()[0].startswith("reading: 500 of 1,000 bytes  ")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("quantization_config", {"quant_method": "gptq", "bits": 4}, "is not a complete PMNet model"),
        ("architectures", 5, "is not a complete PMNet model"),
        ("eos_token_id", [1, "x"], "eos_token_id must be an id"),
        ("bos_token_id", "a", "bos_token_id must be an id"),
    ],
)
def test_a_configuration_that_nobody_can_use_is_named(model, field, value, message):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    fails(["generate", model, "--prompt", "a", "--bytes", 2], message)


@pytest.mark.parametrize("learned", [5, [1], {"copy-paste": None}, {"copy-paste": {"size": "x"}}, {}], ids=str)
def test_a_demo_is_for_what_was_learned(model, learned):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"task_specific_params": learned}))
    fails(["demo", model, "--string", "a", "--seconds", 0], "was not trained on copy-paste")


def test_outputs_are_asked_for_by_name(model):
    path = model / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"return_dict": False}))
    assert run_cli(["generate", str(model), "--prompt", "a", "--bytes", "2"])[0] == 0


def test_counts_fit_a_terminal_of_eighty_columns():
    command = [sys.executable, "-m", "pmnet", "flops", "--preset", "119m"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "…" not in printed
    assert max(map(len, printed.splitlines())) <= 80
