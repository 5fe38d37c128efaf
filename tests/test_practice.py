"""Practice beside text: no text is left out, the state passes over it, and a run resumes to the bit."""

import json
import signal
from dataclasses import replace

import pytest
import torch

from pmnet.data.files import open_files
from pmnet.data.streams import ContiguousWindows
from pmnet.model.tokenizer import PASTE
from pmnet.train import loop
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import TrainingInterrupted, train
from pmnet.train.practice import Practice
from pmnet.train.recipes import lm_tiny
from pmnet.train.tasks import ByteTask
from tests.conftest import run_cli
from tests.test_cli import fails
from tests.test_training import recipe, weights

PLAN = recipe(steps=12, length=16, carry=True, practice=3, size=2)


def source(folder, processes=1) -> Practice:
    windows = ContiguousWindows(open_files([folder]), PLAN.length, PLAN.batch_size, PLAN.seed, processes)
    ladder = build_ladder("copy-paste", replace(PLAN, steps=4), processes)
    return Practice(ByteTask(windows), ladder, 3, processes)


@pytest.mark.parametrize("processes", [1, 2])
def test_every_third_batch_is_practice_and_no_text_is_left_out(books, processes):
    mixed, text = source(books, processes), source(books, processes).text
    read = []
    for index in range(12 * processes):
        batch = mixed.batch(index)
        asked = index // processes % 3 == 0
        assert mixed.practised == asked == ("restart" not in batch) == bool((batch["input_ids"] == PASTE).any())
        if not asked:
            read.append(batch)
    for index, batch in enumerate(read):
        assert all(torch.equal(batch[name], part) for name, part in text.batch(index).items())


def test_only_practice_is_observed(books, monkeypatch):
    mixed, observed = source(books), []
    monkeypatch.setattr(mixed.ladder, "observe", observed.append)
    for index in range(30):
        mixed.batch(index)
        mixed.observe(1.0 if index % 3 == 0 else 0.0)
    assert observed == [1.0] * 10
    other = source(books)
    other.restore(json.loads(json.dumps(mixed.state())))
    assert other.state() == mixed.state()


def test_the_carried_state_passes_over_practice(books, tmp_path, monkeypatch):
    states = []

    def spied(model, batch, carry):
        found = plain(model, batch, carry)
        states.append({name: part.clone() for name, part in carry.state().items()})
        return found

    plain = loop.loss_of
    monkeypatch.setattr(loop, "loss_of", spied)
    train(PLAN, source(books), tmp_path / "run")
    assert len(states) == 12
    for step in range(1, 12):
        now, before = states[step], states[step - 1]
        same = now.keys() == before.keys() and all(torch.equal(now[name], part) for name, part in before.items())
        assert same == (step % 3 == 0)


def test_a_run_with_practice_resumes_to_the_bit(books, tmp_path, monkeypatch):
    train(PLAN, source(books), tmp_path / "whole")
    plain, steps = loop.loss_of, []

    def interrupted(*given):
        steps.append(1)
        if len(steps) == 7:  # a step of practice
            signal.raise_signal(signal.SIGTERM)
        return plain(*given)

    monkeypatch.setattr(loop, "loss_of", interrupted)
    with pytest.raises(TrainingInterrupted):
        train(PLAN, source(books), tmp_path / "cut")
    train(PLAN, source(books), tmp_path / "cut", resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(cut[name], weight) for name, weight in whole.items())


def test_practice_on_the_command_line(books, tmp_path):
    run = tmp_path / "run"
    common = ["train", "--preset", "demo", "--data", books, "--batch-size", 2, "--length", 16, "--out", run]
    code, printed = run_cli([str(word) for word in (*common, "--practice", 1)])
    assert code == 2
    assert "--practice" in printed
    fails(["train", "copy-paste", "--practice", 4], "--practice")
    code, printed = run_cli([str(word) for word in (*common, "--steps", 4, "--practice", 2, "--size", 3)])
    assert code == 0, printed
    assert "64 bytes to read" in printed  # two batches of 2 x 16
    assert "beside 2 batches of practice" in " ".join(printed.split())
    facts = json.loads((run / "config.json").read_text())["recipe"]
    assert (facts["practice"], facts["size"]) == (2, 3)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [row["practised"] for row in rows] == [True, False]
    further = tmp_path / "further"
    options = ["--from", run / "model", "--out", further, "--steps", 2, "--practice", 2]
    code, printed = run_cli([str(word) for word in (*common, *options)])
    assert code == 0, printed
    assert json.loads((further / "metrics.jsonl").read_text().splitlines()[-1])["stage"] == 0  # as a whole at once


@pytest.mark.parametrize("model", ["pmnet", "llama", "mamba2"])
def test_controls_practise_beyond_the_same_reach(books, tmp_path, model):
    train = ["train", "--preset", "tiny", "--data", books, "--batch-size", 2, "--length", 16, "--steps", 2]
    options = ["--practice", 2, "--size", 2, "--no-carry", "--model", model, "--out", tmp_path / "run"]
    code, printed = run_cli([str(word) for word in (*train, *options)])
    assert code == 0, printed
    facts = json.loads((tmp_path / "run" / "config.json").read_text())["recipe"]
    assert facts["gap"] == lm_tiny().model.receptive_field == 61
