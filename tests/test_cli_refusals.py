"""Bad input is refused before anything is measured, in one sentence that names the option and the value."""

import os
from pathlib import Path

import pytest
import torch

from pmnet import cli_bench
from pmnet.baselines import LSTMConfig, LSTMForCausalLM
from pmnet.data.tasks import CopyPaste, Filler, Lookup
from pmnet.data.tasks.episodes import LONGEST
from pmnet.train.ladders import LARGEST
from tests.conftest import run_cli, small_model
from tests.test_cli import fails

MEASUREMENTS = (
    "pmnet.cli.bits_per_byte",
    "pmnet.cli_gradients.jacobian",
    "pmnet.cli_gradients.run",
    "pmnet.cli_gradients.spread",
    "pmnet.cli_gradients.state_errors",
    "pmnet.cli_longcontext.bits_by_position",
    "pmnet.cli_retrieval.measure_cell",
    "pmnet.cli_retrieval.mechanism",
    "pmnet.cli_train.train",
)
HUGE = 99_999_999_999


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The current folder, with models `model`, `off` and `lstm` and a file `text`; no measurement may begin."""
    model = small_model("deep")
    model.save_pretrained(tmp_path / "model")
    model.config.memory_cumsum = False
    model.save_pretrained(tmp_path / "off")
    LSTMForCausalLM(LSTMConfig(hidden_size=8)).save_pretrained(tmp_path / "lstm")
    (tmp_path / "text").write_bytes(b"It was a dark and stormy night. " * 40)
    monkeypatch.chdir(tmp_path)
    for name in MEASUREMENTS:
        monkeypatch.setattr(name, lambda *_, name=name, **__: pytest.fail(f"{name} was called"))
    return tmp_path


@pytest.mark.parametrize(("options", "words"), [
    ("--task needle --sizes 900,50", ["--sizes 50", "variant number"]),
    (f"--task needle --variants keys --sizes 900,{HUGE}", [f"--sizes {HUGE}", "at most 1,048,576"]),
    (f"--task selective-copy --sizes 16,{HUGE}", [f"--sizes {HUGE}", "at most 1,048,576"]),
    (f"--task lookup --sizes 8,{HUGE}", [f"--sizes {HUGE}", "at most 16,384"]),
    (f"--task recall --sizes 4,{HUGE}", [f"--sizes {HUGE}", "no room"]),
    (f"--sizes 8,{HUGE}", [f"--sizes {HUGE}", "at most 1,048,576"]),
    ("--sizes 8,0", ["--sizes 0"]),
    ("--sizes ,", ["--sizes", "','"]),
    (f"--rounds {HUGE}", [f"--rounds {HUGE}", "at most 1,048,576"]),
    ("--rounds 2 --task recall", ["--rounds 2"]),
    ("--task recall --variants two", ["--variants", "1, 2", "'two'"]),
    ("--variants random,snow", ["--variants", "random, constant, text", "'snow'"]),
    ("--variants ,", ["--variants", "','"]),
    ("--task needle --distances 0.5,5", ["--distances", "'5'"]),
    ("--task recall --distances 5", ["--distances", "'5'"]),
    ("--distances far", ["--distances", "'far'"]),
    ("--distances 2.5", ["--distances", "'2.5'"]),
    ("--text text", ["--text text"]),
    ("--task lookup --text text", ["--text text"]),
])  # fmt: skip
def test_a_grid_is_refused_as_a_whole(folder, options, words):
    fails(["eval", "retrieval", "model", "--save", "out", *options.split()], *words)
    assert not (folder / "out").exists()


def test_a_text_is_for_those_who_read_it(folder, monkeypatch):
    monkeypatch.setattr("pmnet.cli_retrieval.measure_cell", lambda *_: (_ for _ in ()).throw(OSError("measured")))
    fails(["eval", "retrieval", "model", "--text", "text", "--variants", "random,text"], "measured")
    fails(["eval", "retrieval", "model", "--text", "text", "--task", "needle", "--sizes", "900"], "measured")


@pytest.mark.parametrize(("command", "words"), [
    (f"retrieval lstm --distances 4,{HUGE}", ["cannot be read at once", "1,048,576"]),
    (f"memory model --save out --gap {2 * LONGEST}", ["cannot be read at once", "1,048,576"]),
    ("memory model --save out --gap 5", ["a gap of 5"]),
    ("longcontext model --data text --length many", ["--length", "'many'"]),
    ("longcontext model --data text --length 100 --reset many", ["--reset", "'many'"]),
    ("gradients jacobian --models lstm,llama --save out", ["--models llama"]),
    ("gradients jacobian --models lstm,no-recurrence --save out", ["--models no-recurrence", "memory_cumsum"]),
    ("gradients jacobian off --models lstm --save out", ["off:", "memory_cumsum"]),
    ("gradients training --models lstm,chess --save out", ["'chess'"]),
    ("gradients training --models , --save out", ["--models", "','"]),
    ("gradients training --lengths 128,5 --save out", ["--lengths", "from 20 to 1,048,576", "'128,5'"]),
    (f"gradients training --lengths 128,{HUGE} --save out", ["--lengths", "from 20 to 1,048,576"]),
    ("gradients training --lengths 30.5 --save out", ["--lengths", "'30.5'"]),
    (f"gradients precision --lengths 10,{HUGE} --save out", ["--lengths", "from 1 to 1,000,000,000"]),
    ("gradients saturation model lstm --save out", ["lstm:", "not a PMNet"]),
    ("gradients saturation model off --save out", ["off:", "memory_cumsum"]),
])  # fmt: skip
def test_a_measurement_is_refused_as_a_whole(folder, command, words):
    fails(["eval", *command.split()], *words)
    assert not (folder / "out").exists()


@pytest.mark.parametrize(("command", "file"), [
    ("retrieval model", "copy-paste.png"),
    ("memory model", "memory.json"),
    ("longcontext model --data text --length 1000", "longcontext.png"),
    ("gradients jacobian --models lstm", "jacobian.json"),
    ("gradients training --models lstm", "training.json"),
    ("gradients precision", "precision.png"),
    ("gradients saturation", "saturation.json"),
])  # fmt: skip
def test_a_place_that_cannot_be_used_is_refused_before_the_work(folder, command, file):
    fails(["eval", *command.split(), "--save", "text/inside"], "nothing can be saved in text/inside: Not a directory")
    (folder / "out" / file).mkdir(parents=True)
    fails(["eval", *command.split(), "--save", "out"], f"out/{file} is a folder")


def test_a_file_that_cannot_be_made_is_refused_before_the_work(folder):
    told = "nothing can be saved in text: Not a directory"
    fails(["eval", "bits", "model", "--data", "text", "--save", "text/bits.json"], told)
    fails(["generate", "model", "--save-state", "text/state"], told)
    os.mkfifo("pipe")
    fails(["eval", "bits", "model", "--data", "text", "--save", "pipe"], "pipe is no file")


@pytest.mark.parametrize(("options", "words"), [
    (f"copy-paste --size {LARGEST + 1}", ["size", "at most 65,536", "got 65,537"]),
    (f"selective-copy --size {LARGEST + 1}", ["size", "at most 65,536", "got 65,537"]),
    (f"needle --size {LARGEST + 1}", ["size", "at most 65,536", "got 65,537"]),
    ("lookup --size 20000", ["size 20000", "at most 16,384"]),
    ("recall --size 300", ["size 300", "no room"]),
    ("copy-paste --window 40000", ["window", "at most 65,536", "got 79,999"]),
    (f"copy-paste --preset box-finish --from model --rounds {LARGEST + 1}", ["rounds", "at most 65,536"]),
    (f"lm --data text --batch-size 1 --practice 2 --size {LARGEST + 1}", ["size", "at most 65,536", "got 65,537"]),
    ("copy-paste --rounds 2", ["2 rounds", "box-finish"]),
    ("lm --data text --piece 600 --no-carry", ["piece (600)"]),
    ("copy-paste --model real-memory --phase-bits 5", ["--phase-bits", "real-memory", "nothing is rounded"]),
    ("copy-paste --model lstm --compile", ["--compile cannot trace lstm"]),
    ("copy-paste --model ntm --compile", ["--compile cannot trace ntm"]),
])  # fmt: skip
def test_a_training_beyond_what_can_be_drawn_is_refused(folder, options, words):
    fails(["train", *options.split(), "--steps", "1", "--out", "run"], *words)
    assert not (folder / "run").exists()


def test_generators_know_what_they_can_make_at_once():
    for problem in (lambda: CopyPaste((1, LONGEST + 1), (0, 0)), lambda: Lookup((9, 20_000))):
        with pytest.raises(ValueError, match="at most"):
            problem()
    gap = (LONGEST, LONGEST)
    with pytest.raises(ValueError, match="cannot be read at once"):
        CopyPaste((1, 1), gap, (Filler("constant"),)).draw(1, torch.Generator()).dense()


@pytest.mark.parametrize("command", [
    "eval bits model --data text --save",
    "eval retrieval model --save",
    "eval memory model --save",
    "eval longcontext model --data text --save",
    "eval gradients jacobian --save",
    "bench --save",
    "flops --preset demo --json",
    "generate model --save-state",
    "data demo --out",
    "train copy-paste --out",
])  # fmt: skip
def test_names_that_are_not_utf8_are_refused_before_the_work(folder, command):
    place, before = os.fsdecode(b"bad\xff"), sorted(os.listdir())
    *start, option = command.split()
    for given in ([option, place], [f"{option}={place}"]):
        code, printed = run_cli([*start, *given])
        assert code == 2
        assert f"{option} is not UTF-8" in printed
    assert sorted(os.listdir()) == before


def test_flops_are_not_counted_for_a_place_that_cannot_be_written(folder, monkeypatch):
    Path("file").write_text("")
    monkeypatch.setattr(cli_bench, "tables", lambda *given: pytest.fail("counted"))
    fails(["flops", "--preset", "demo", "--json", "file/counts.json"], "nothing can be saved in file")


def test_a_run_in_a_folder_that_is_not_utf8_is_refused(folder, monkeypatch):
    os.mkdir(b"bad\xff")
    monkeypatch.chdir(os.fsdecode(b"bad\xff"))
    fails(["train", "copy-paste", "--steps", 2, "--out", "run"], "not UTF-8")
