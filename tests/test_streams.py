"""Reading in order: windows that cover every byte once, states that are carried by any model, runs that resume."""

import os
import signal
from contextlib import nullcontext

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from pmnet.baselines import Carry, carries, control, mamba2, matrix_scan
from pmnet.baselines.mamba2 import chunk_scan
from pmnet.data.files import RandomWindows, open_files
from pmnet.data.streams import ContiguousWindows
from pmnet.data.tasks import CopyPaste
from pmnet.eval.retrieval import measure
from pmnet.model.tokenizer import BOS
from pmnet.train import loop
from pmnet.train.loop import TrainingStopped, train
from pmnet.train.tasks import ByteTask
from tests.conftest import random_ids, small_config
from tests.test_training import recipe, task, weights

MODELS = ["pmnet", "no-recurrence", "sliding-window", "mamba2"]


def build(name: str, **changes):
    torch.manual_seed(0)
    config = small_config("period", hidden_size=64, head_dim=16, intermediate_size=96, **changes)
    return AutoModelForCausalLM.from_config(config if name == "pmnet" else control(name, config)).eval()


@pytest.mark.parametrize(("rows", "processes"), [(1, 1), (3, 1), (2, 2)])
def test_an_epoch_reads_every_window_once_and_in_order(books, rows, processes):
    files = open_files([books])
    windows = ContiguousWindows(files, 32, rows, 7, processes)
    lanes = {(p, row): b"" for p in range(processes) for row in range(rows)}
    whole = {path.read_bytes() for path in files.paths}
    seen = []
    for index in range(windows.steps * processes):
        batch = windows.batch(index)
        for row in range(rows):
            ids, labels = batch["input_ids"][row], batch["labels"][row]
            text = labels[labels != -100]
            assert torch.equal(ids[1 : len(text)], text[:-1])
            key = (index % processes, row)
            if batch["restart"][row]:
                seen.append(lanes[key])
                lanes[key] = b""
                assert ids[0] == BOS or index < processes
            else:
                assert ids[0] == lanes[key][-1]
            lanes[key] += bytes(text.tolist())
    seen = [piece for piece in [*seen, *lanes.values()] if piece]
    left_out = sum(-(-size // 32) for size in files.sizes) % (rows * processes)
    assert sum(map(len, seen)) >= files.total - 32 * left_out
    assert all(any(piece in book for book in whole) for piece in seen)
    assert sum(piece in whole for piece in seen) >= len(whole) - rows * processes - 1


def test_pieces_are_read_in_order_each_from_an_empty_state(books):
    files = open_files([books])
    windows = ContiguousWindows(files, 32, 1, 7, piece=80)
    found = []
    for index in range(windows.steps):
        batch = windows.batch(index)
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        text = bytes(labels[labels != -100].tolist())
        if batch["restart"][0]:
            found.append((ids[0].item(), text))
        else:
            assert ids[0] == found[-1][1][-1]
            found[-1] = found[-1][0], found[-1][1] + text
    whole = [path.read_bytes() for path in files.paths]
    expected = [(book[at - 1] if at else BOS, book[at : at + 80]) for book in whole for at in range(0, len(book), 80)]
    assert sorted(found) == sorted(expected)
    assert found != expected
    with pytest.raises(ValueError, match="pieces of 31 bytes are shorter than windows of 32"):
        ContiguousWindows(files, 32, 1, 7, piece=31)


def test_order_is_a_function_of_seed_and_epoch(books):
    files = open_files([books])
    windows, again = ContiguousWindows(files, 32, 2, 7), ContiguousWindows(files, 32, 2, 7)
    far = 2 * windows.steps + 3
    assert all(torch.equal(windows.batch(far)[name], again.batch(far)[name]) for name in windows.batch(far))
    epochs = [torch.cat([windows.batch(e * windows.steps + i)["labels"] for i in range(windows.steps)]) for e in (0, 1)]
    assert not torch.equal(*epochs)
    assert windows.batch(windows.steps)["restart"].all()
    with pytest.raises(ValueError, match="too few for 999 rows"):
        ContiguousWindows(files, 32, 999, 0)


def test_windows_cover_files_and_shift_labels(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"the quick brown fox jumps over the lazy dog. " * 40)
    (tmp_path / "b.bin").write_bytes(bytes(range(256)))
    windows = RandomWindows(open_files([tmp_path]), 16, 64, seed=1)
    batch = windows.batch(5)
    again = windows.batch(5)
    assert all(torch.equal(batch[name], again[name]) for name in batch)
    assert not torch.equal(batch["input_ids"], windows.batch(6)["input_ids"])
    same = batch["labels"][:, :-1] != -100
    assert torch.equal(batch["input_ids"][:, 1:][same], batch["labels"][:, :-1][same])
    (tmp_path / "a.txt").unlink()
    every = RandomWindows(open_files([tmp_path]), 32, 64, seed=1)
    drawn = torch.cat([every.batch(index)["labels"] for index in range(40)])
    assert set(drawn.flatten().tolist()) == set(range(256))  # the first and the last byte of the file too


@pytest.mark.parametrize("name", MODELS)
def test_windows_with_a_carried_state_are_one_long_read(name):
    model, ids = build(name), random_ids(3, 90)
    carry = Carry(model, 3)
    with torch.no_grad():
        parts = torch.cat([carry.read(part) for part in ids.split([40, 1, 9, 40], dim=1)], 1)
        whole = Carry(model, 3).read(ids)
    assert torch.allclose(parts, whole, atol=2e-4)
    size = carry.nbytes
    with torch.no_grad():
        carry.read(ids)
    assert carry.nbytes == size


def test_a_window_that_is_refused_was_not_read():
    carry = Carry(build("pmnet"), 3)
    with pytest.raises(ValueError, match="input_ids must lie in"):
        carry.read(torch.full((3, 4), -1))
    assert carry.columns == carry.cache.columns == 0
    assert carry.state() == {}


@pytest.mark.parametrize("name", ["pmnet", "mamba2"])
def test_a_restarted_row_has_forgotten(name):
    model, ids = build(name), random_ids(3, 60)
    carry = Carry(model, 3)
    with torch.no_grad():
        carry.read(ids[:, :30])
        mixed = carry.read(ids[:, 30:], torch.tensor([False, True, False]))
        fresh = Carry(model, 3).read(ids[:, 30:])
        whole = Carry(model, 3).read(ids)[:, 30:]
    assert torch.allclose(mixed[1], fresh[1], atol=2e-4)
    assert torch.allclose(mixed[::2], whole[::2], atol=2e-4)
    assert not torch.allclose(mixed[0], fresh[0], atol=1e-2)


@pytest.mark.parametrize(("read", "half"), [(50, False), (3, False), (50, True)])
@pytest.mark.parametrize("name", MODELS)
def test_a_saved_state_continues_to_the_bit(name, read, half):
    model, ids = build(name), random_ids(2, 80)
    carry, other = Carry(model, 2), Carry(model, 2)
    assert carry.state() == {}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=half):
        carry.read(ids[:, :read])
        saved = {key: tensor.clone() for key, tensor in carry.state().items()}
        with torch.autocast("cpu", enabled=False):
            other.restore(saved)
        assert torch.equal(carry.read(ids[:, read:]), other.read(ids[:, read:]))
    with pytest.raises(ValueError, match="another model's"):
        Carry(model, 3).restore(saved)


def test_gradients_stop_at_the_edge_of_a_window():
    for name in MODELS:
        model = build(name).train()
        carry = Carry(model, 2)
        for part in random_ids(2, 60).split(30, dim=1):
            carry.read(part).square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad), name


def test_what_has_no_constant_state_is_refused():
    config = LlamaConfig(vocab_size=384, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    assert not carries(config)
    with pytest.raises(ValueError, match="llama has no state of constant size"):
        Carry(AutoModelForCausalLM.from_config(config), 1)


def test_the_matrix_scan_is_the_librarys():
    config = control("mamba2", small_config("period", hidden_size=64))
    config.num_hidden_layers = 2
    model = AutoModelForCausalLM.from_config(config)
    ids, found = random_ids(2, 75), []
    for scan in (False, True):
        model.zero_grad()
        with matrix_scan(model) if scan else nullcontext():
            logits = model(ids, use_cache=False).logits
        logits.square().mean().backward()
        found.append((logits.detach(), {name: p.grad.clone() for name, p in model.named_parameters()}))
    assert torch.allclose(found[0][0], found[1][0], atol=1e-5)
    for name, gradient in found[0][1].items():
        assert torch.dist(gradient, found[1][1][name]) <= 1e-4 * gradient.norm() + 1e-9, name


def test_mamba_trains_and_is_measured_by_the_matrix_scan(books, tmp_path, monkeypatch):
    config = control("mamba2", small_config("period", hidden_size=64))
    plan, lengths = recipe(steps=1, model=config), []

    def counted(hidden_states, *args, **kwargs):
        lengths.append(hidden_states.shape[1])
        return chunk_scan(hidden_states, *args, **kwargs)

    monkeypatch.setattr(mamba2, "chunk_scan", counted)
    model = train(plan, task(books, plan), tmp_path)
    assert lengths == [plan.length] * config.num_hidden_layers
    measure(model, CopyPaste((2, 2), (5, 5)), 4, 0)
    assert len(lengths) == 2 * config.num_hidden_layers


@pytest.mark.parametrize("name", MODELS)
def test_a_run_that_carries_its_state_resumes_to_the_bit(name, books, tmp_path, monkeypatch):
    config = small_config("period", hidden_size=64, head_dim=16, intermediate_size=96)
    config = config if name == "pmnet" else control(name, config)
    plan = recipe(steps=7, carry=True, checkpoint_seconds=1e9, model=config)

    def source():
        return ByteTask(ContiguousWindows(open_files([books]), plan.length, plan.batch_size, plan.seed))

    train(plan, source(), tmp_path / "whole")
    original, calls = loop.loss_of, []

    def interrupted(model, batch, carry):
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(model, batch, carry)

    monkeypatch.setattr(loop, "loss_of", interrupted)
    with pytest.raises(TrainingStopped, match="SIGTERM after step 4"):
        train(plan, source(), tmp_path / "cut")
    monkeypatch.setattr(loop, "loss_of", original)
    train(plan, source(), tmp_path / "cut", resume=True)
    whole, cut = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    for key, tensor in whole.items():
        assert torch.equal(tensor, cut[key]), key
    (tmp_path / "cut" / "checkpoints" / "step-7" / "state.safetensors").unlink()
    with pytest.raises(ValueError, match="step-7 is damaged"):
        train(plan, source(), tmp_path / "cut", resume=True)


@pytest.mark.parametrize("processes", [1, 2])
def test_workers_read_the_same_batches_ahead(processes, books):
    files = open_files([books])
    for windows in (RandomWindows(files, 16, 2, 1), ContiguousWindows(files, 16, 2, 1, processes)):
        ahead = ByteTask(windows, workers=2, processes=processes)
        for first in (1, 70):  # from the beginning of a process, across an epoch, and after a leap
            for index in range(first, first + 12 * processes, processes):
                mine, same = ahead.batch(index), windows.batch(index)
                assert mine.keys() == same.keys()
                assert all(torch.equal(mine[name], part) for name, part in same.items())
