"""The command line: real input, and one clear sentence for bad input."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pmnet
from pmnet.baselines import LSTMConfig, LSTMForCausalLM
from tests.conftest import assert_same_state, run_cli, small_model


@pytest.fixture
def model(tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes(b"It was a dark and stormy night; the rain fell in torrents. " * 30)
    return path


def fails(arguments, *words):
    code, printed = run_cli(list(map(str, arguments)))
    assert code == 1
    lines = [line for line in printed.splitlines() if line.startswith("pmnet:")]
    assert len(lines) == 1
    assert "Traceback" not in printed
    for word in words:
        assert word in lines[0]


def test_train_eval_generate(text, tmp_path):
    run = tmp_path / "run"
    common = ["train", "--data", text, "--out", run, "--steps", 3, "--batch-size", 2, "--length", 16, "--no-compile"]
    assert run_cli(list(map(str, common)))[0] == 0
    config = json.loads((run / "config.json").read_text())
    assert config["recipe"]["steps"] == 3
    assert config["versions"]["torch"] == torch.__version__
    code, printed = run_cli(["eval", "bits", str(run / "model"), "--data", str(text), "--save", str(run / "bits.json")])
    assert code == 0
    assert f"{text.stat().st_size:,} bytes" in printed
    assert 0 < json.loads((run / "bits.json").read_text())["bits_per_byte"] < 9
    code, printed = run_cli(["generate", str(run / "model"), "--prompt", "It was", "--bytes", "5"])
    assert code == 0
    assert printed.startswith("It was")


def test_a_refused_resume_leaves_the_record_of_the_run(text, tmp_path):
    run = tmp_path / "run"
    common = ["train", "--data", text, "--out", run, "--batch-size", 2, "--length", 16]
    assert run_cli(list(map(str, [*common, "--steps", 1])))[0] == 0
    before = (run / "config.json").read_bytes()
    fails([*common, "--steps", 2, "--resume"], "another recipe: steps (1 there, 2 here)")
    assert (run / "config.json").read_bytes() == before


def test_a_wider_window_asks_from_beyond_its_reach(tmp_path):
    """Otherwise attention could answer, and the memory would not be learned."""
    command = ["train", "copy-paste", "--window", "12", "--steps", "1", "--batch-size", "2", "--size", "1"]
    assert run_cli([*command, "--out", str(tmp_path)])[0] == 0
    assert json.loads((tmp_path / "config.json").read_text())["recipe"]["gap"] == 2 * 11 + 1


def test_bits_are_those_of_one_parallel_pass(model, text):
    network = pmnet.PMNetForCausalLM.from_pretrained(model)
    data = torch.tensor([[257, *text.read_bytes()]])
    with torch.no_grad():
        loss = network(data, labels=data).loss.item()
    _, printed = run_cli(["eval", "bits", str(model), "--data", str(text)])
    assert abs(float(printed.split()[0]) - loss / 0.6931471805599453) < 1e-3


def test_retrieval_table_is_stored(model, tmp_path):
    arguments = ["eval", "retrieval", str(model), "--strings", "8", "--sizes", "1,2", "--distances", "0.5x,3x,2000"]
    code, printed = run_cli([*arguments, "--save", str(tmp_path / "result")])
    assert code == 0
    assert "2,000" in printed
    stored = json.loads((tmp_path / "result" / "copy-paste.json").read_text())
    cells = stored["cells"]
    assert [(cell["size"], cell["distance"]) for cell in cells] == [(k, n) for k in (1, 2) for n in (8, 48, 2000)]
    assert [cell["control"] is None for cell in cells] == [False, False, True] * 2
    assert stored["commit"] is None or len(stored["commit"]) >= 40
    assert (tmp_path / "result" / "copy-paste.png").read_bytes().startswith(b"\x89PNG")


def test_the_widest_row_fits_a_terminal(model, monkeypatch):
    right = {"exact": 1.0, "letters": 1.0}
    row = {"size": 16, "variant": "constant", "distance": 1e6, "low": 0.996, "high": 1.0, "control": right, **right}
    monkeypatch.setattr("pmnet.cli_retrieval.measure_cell", lambda *_: row)
    monkeypatch.setattr("pmnet.cli_retrieval.out.width", 80)
    _, printed = run_cli(["eval", "retrieval", str(model), "--sizes", "16", "--distances", "5"])
    line = "16   constant   1,000,000   100.0%   99.6-100.0   100.00%   100.0%   100.00%"
    assert line in [part.strip() for part in printed.splitlines()]


@pytest.mark.parametrize(
    ("task", "sizes", "variants", "distances"),
    [
        ("copy-paste", "2", "random,constant,text", "5"),
        ("selective-copy", "2", "", ""),
        ("recall", "4,8", "1,2", ""),
        ("lookup", "8", "", ""),
        ("needle", "900", "", "0,0.5"),
    ],
)
def test_every_task_is_measured(model, text, tmp_path, task, sizes, variants, distances):
    arguments = ["eval", "retrieval", str(model), "--task", task, "--strings", "3", "--sizes", sizes]
    arguments += ["--variants", variants, "--distances", distances, "--no-control"]
    arguments += ["--text", str(text)] if task in ("copy-paste", "needle") else []
    assert run_cli([*arguments, "--save", str(tmp_path)])[0] == 0
    cells = json.loads((tmp_path / f"{task}.json").read_text())["cells"]
    assert len(cells) == {"copy-paste": 3, "selective-copy": 1, "recall": 4, "lookup": 2, "needle": 6}[task]
    assert all(cell["strings"] == 3 and cell["control"] is None for cell in cells)


def test_bad_grids_are_named(model):
    start = ["eval", "retrieval", model]
    fails([*start, "--task", "chess"], "unknown task 'chess'")
    for distance in ("far", "inf", "nanx", "-4"):
        fails([*start, "--distances", distance], f"not '{distance}'")
    fails(["eval", "memory", model, "--gap", "16"], "within the reach")
    fails([*start, "--task", "recall", "--sizes", "300", "--variants", "1"], "127 pairs")
    fails(["eval", "gradients", "saturation", "/nowhere"], "/nowhere")
    fails(["eval", "gradients", "training", "--lengths", "0"], "--lengths", "from 20 to")
    fails([*start, "--variants", "text", "--text", "/nowhere"], "no file at /nowhere")
    fails([*start, "--sizes", "8,many"], "--sizes", "'8,many'")
    fails([*start, "--distances", "2.5"], "whole bytes", "2.5")
    folder = model.parent / "lstm"
    LSTMForCausalLM(LSTMConfig(hidden_size=8)).save_pretrained(folder)
    fails(["eval", "retrieval", folder], "lacks")
    fails(["eval", "retrieval", folder, "--task", "chess"], "unknown task")


def test_a_saved_state_is_continued(model, tmp_path):
    start = ["generate", str(model), "--temperature", "0"]
    state = str(tmp_path / "new" / "state.safetensors")
    (tmp_path / "prompt").write_bytes(b"a")
    run_cli([*start, "--prompt-file", str(tmp_path / "prompt"), "--bytes", "1", "--save-state", state])
    run_cli([*start, "--state", state, "--prompt", "bc", "--bytes", "4", "--save-state", str(tmp_path / "after")])
    network = pmnet.PMNetForCausalLM.from_pretrained(model).eval()
    expected = pmnet.PMNetCache(network.config)
    for prompt, count in ((b"a", 1), (b"bc", 4)):
        list(pmnet.stream_bytes(network, prompt, expected, count, temperature=0.0))
    assert_same_state(pmnet.PMNetCache.load(tmp_path / "after"), expected)
    fails([*start, "--state", state], "prompt")
    fails([*start, "--save-state", tmp_path], "is a folder")
    cache = pmnet.PMNetCache.load(state)
    assert cache.seen.tolist() == [3]  # BOS, the prompt, the byte that was written


def test_bad_data_is_named(model, tmp_path):
    empty = tmp_path / "empty"
    empty.write_bytes(b"")
    folder = tmp_path / "hollow"
    folder.mkdir()
    fails(["train", "--data", tmp_path / "nowhere", "--out", tmp_path / "r"], "no file or folder at", "nowhere")
    fails(["train", "--data", empty, "--out", tmp_path / "r"], "empty")
    fails(["train", "--data", folder, "--out", tmp_path / "r"], "no bytes", "hollow")
    fails(["train", "--out", tmp_path / "r"], "--data")
    pieces = ["train", "--data", model / "config.json", "--out", tmp_path / "r", "--piece", "600"]
    fails([*pieces, "--no-carry"], "piece", "needs carry")
    fails([*pieces, "--length", "601"], "pieces of 600 bytes")
    fails(["train", "poetry"], "unknown task 'poetry'")
    for task, size in (("needle", 95), ("recall", 2)):
        fails(["train", task, "--size", size, "--out", tmp_path / "r"], f"at size {size}")
    fails(["train", "copy-paste", "--data", empty, "--out", tmp_path / "r"], "--data is for lm")
    for option in ("--phase-bits", "--window"):
        fails(["train", "--model", "llama", option, "3", "--data", empty, "--out", tmp_path / "r"], option, "llama")
    fails(["train", "--data", empty, "--learning-rate", "inf", "--out", tmp_path / "r"], "learning_rate", "inf")
    fails(["train", "--data", empty, "--learning-rate", "1e41", "--out", tmp_path / "r"], "learning_rate", "1e+41")
    fails(["train", "copy-paste", "--carry", "--out", tmp_path / "r"], "--carry", "copy-paste")
    fails(["train", "--size", "3", "--data", empty, "--out", tmp_path / "r"], "--size")
    fails(["train", "--precision", "fp16", "--data", empty, "--out", tmp_path / "r"], "fp16")
    narrow = ["train", "--data", model / "config.json", "--model", "sliding-window", "--window", "1"]
    fails([*narrow, "--out", tmp_path / "r"], "at least 2")
    fails(["train", "--preset", "huge", "--data", empty], "unknown preset 'huge'")
    fails(["eval", "bits", model, "--data", tmp_path / "nowhere"], "nowhere")
    assert not (tmp_path / "r").exists()


def test_an_unreadable_file_is_named(text, tmp_path, monkeypatch):
    original = Path.open

    def refuse(path, *arguments, **more):
        if path == text:
            raise PermissionError(13, "Permission denied", str(path))
        return original(path, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    fails(["train", "--data", text, "--out", tmp_path / "r"], "Permission denied", "text.txt")
    assert not (tmp_path / "r").exists()


def test_bad_models_are_named(model, text, tmp_path):
    fails(["eval", "bits", tmp_path / "nothing", "--data", text], "is not a model", "config.json")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    fails(["eval", "bits", model, "--data", text], "not a complete PMNet model")
    weights.write_bytes(whole)
    settings = json.loads((model / "config.json").read_text())
    for change, word in (
        ({"memory_write_period": 2}, "memory_write_period"),
        ({"sliding_window": 0}, "sliding_window"),
        ({"num_memory": 1}, "num_memory"),
        ({"num_key_value_heads": 3}, "num_key_value_heads"),
        ({"hidden_size": 40}, " is of another shape"),
        ({"model_type": "llama"}, "model_type"),
    ):
        (model / "config.json").write_text(json.dumps(settings | change))
        fails(["generate", model], word)
    (model / "config.json").write_text("{")
    fails(["generate", model], "not a complete PMNet model")


def test_weights_that_are_not_finite_or_not_all_there_are_named(model, text, tmp_path):
    read = ["eval", "longcontext", "--data", text, "--length", "64"]
    for folder in (model, tmp_path / "lstm"):
        if folder != model:
            LSTMForCausalLM(LSTMConfig(hidden_size=8)).save_pretrained(folder)
        file = folder / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if "norm" in name or "bias" in name)
        save_file(tensors | {name: tensors[name] * math.nan}, file, {"format": "pt"})
        fails([*read, folder], "is damaged", name)
        save_file(
            {other: tensors[other] for other in tensors if other != name},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        fails([*read, folder], "not a complete", name)
        save_file(tensors | {name: tensors[name][:-1]}, file, {"format": "pt"})
        fails([*read, folder], "not a complete", name)


def test_an_unreadable_folder_is_named(text, tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    original = os.scandir

    def refuse(path):
        if Path(path).name == "inside":
            raise PermissionError(13, "Permission denied", str(path))
        return original(path)

    monkeypatch.setattr(os, "scandir", refuse)
    fails(["train", "--data", tmp_path, "--out", tmp_path / "r"], "Permission denied", "inside")


def test_markup_in_a_path_is_no_markup(text, tmp_path):
    run = tmp_path / "[bold]x[/c]"
    common = ["train", "--data", text, "--out", run, "--steps", 1, "--batch-size", 2, "--length", 16]
    code, printed = run_cli(list(map(str, common)))
    assert code == 0
    assert f"model saved to {run / 'model'}" in printed


def test_a_foreign_state_is_named(model, tmp_path):
    other = tmp_path / "state.safetensors"
    pmnet.PMNetCache(small_model("wide").config).save(other)
    fails(["generate", model, "--state", other, "--prompt", "x"], "does not fit", "memory.0")
    cache = pmnet.PMNetCache(small_model("deep").config)
    cache.window[0].keys[:] = math.nan
    cache.save(other)
    fails(["generate", model, "--state", other, "--prompt", "x"], "damaged", "not finite")
    other.write_bytes(other.read_bytes()[:50])
    fails(["generate", model, "--state", other, "--prompt", "x"], "damaged")
    fails(["generate", model, "--state", tmp_path / "none", "--prompt", "x"], "no state file")


def test_a_reader_that_leaves_ends_generate_without_a_word(model):
    command = [sys.executable, "-m", "pmnet", "generate", str(model), "--bytes", "100000"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        running.stdout.read(10)
        running.stdout.close()
        assert running.stderr.read() == b""
    assert running.returncode == 1
