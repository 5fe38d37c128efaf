"""The Neural Turing Machine: its addressing against the formulas of the paper, its copy task, its training command."""

import json

import torch
from torch.nn import functional as F

from benchmarks import ntm, sequential
from pmnet.baselines import NTMConfig, NTMCore, NTMForCausalLM, NTMState
from pmnet.train.checkpoint import latest_checkpoint
from tests.conftest import random_ids


def machine() -> tuple[NTMCore, NTMState]:
    torch.manual_seed(0)
    core = NTMCore(3, 4, hidden=6, slots=5, width=2).double()
    _, state = core(torch.randn(2, 7, 3, dtype=torch.float64))
    return core, state


def test_addresses_are_those_of_the_formulas():
    core, state = machine()
    torch.manual_seed(1)
    key, strength, gate = torch.randn(2, 2, 2).double(), torch.rand(2, 2, 1).double() * 5, torch.rand(2, 2, 1).double()
    shift, sharp = torch.rand(2, 2, 3).double().softmax(-1), 1 + torch.rand(2, 2, 1).double()
    got = core.address(state, key, strength, gate, shift, sharp)
    for b in range(2):
        for head in range(2):
            similar = torch.stack([F.cosine_similarity(key[b, head], row, dim=0) for row in state.memory[b]])
            content = (strength[b, head] * similar).exp()
            content = content / content.sum()
            mixed = gate[b, head] * content + (1 - gate[b, head]) * state.weights[b, head]
            turned = [sum(shift[b, head, 1 - j] * mixed[(i - j) % 5] for j in (-1, 0, 1)) for i in range(5)]
            sharpened = torch.stack(turned) ** sharp[b, head]
            # shift index 0 is one slot forward: slot i receives what stood at i - 1
            assert torch.allclose(got[b, head], sharpened / sharpened.sum(), atol=1e-12)


def test_a_write_erases_then_adds_and_the_read_is_the_weighted_memory():
    core, state = machine()
    x = torch.randn(2, 3, dtype=torch.float64)
    _, after = core.step(x, state)
    *_, erase, add = core.heads(after.hidden).split(core.sizes, dim=-1)
    for b in range(2):
        for n in range(5):
            share = after.weights[b, 1, n]
            kept = state.memory[b, n] * (1 - share * erase[b].sigmoid())
            assert torch.allclose(after.memory[b, n], kept + share * add[b].tanh(), atol=1e-12)
        assert torch.allclose(after.read[b], after.weights[b, 0] @ after.memory[b], atol=1e-12)
    assert torch.allclose(after.weights.sum(-1), torch.ones(2, 2, dtype=torch.float64), atol=1e-12)


def test_the_state_continues_a_sequence():
    core, _ = machine()
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    whole, end = core(x)
    first, middle = core(x[:, :4])
    second, last = core(x[:, 4:], middle)
    assert torch.equal(torch.cat([first, second], 1), whole)
    for one, other in zip(end, last, strict=True):
        assert torch.equal(one, other)
    fresh = core.start(2)
    assert (fresh.memory == 1e-6).all()
    assert fresh.weights[..., 0].eq(1).all()


def test_bytes_are_causal_and_gradients_reach_every_weight():
    torch.manual_seed(0)
    model, ids = NTMForCausalLM(NTMConfig(hidden_size=8, memory_slots=6, memory_width=3)), random_ids(2, 12)
    other = ids.clone()
    other[:, 6] = (other[:, 6] + 1) % 256
    one, two = (model(x).logits for x in (ids, other))
    assert torch.equal(one[:, :6], two[:, :6])
    assert not torch.equal(one[:, 6:], two[:, 6:])
    # the head is the library's: fewer rows may be another order of summation, so the same rows are compared
    last = model.lm_head(model.run(model.embed_tokens(ids))[:, 9:])
    assert torch.equal(model(ids, logits_to_keep=3).logits, last)
    one.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_copy_task_is_that_of_the_paper():
    inputs, bits = ntm.sequences(3, 4, torch.Generator().manual_seed(0))
    assert inputs.shape == (3, 9, 9)
    assert torch.equal(inputs[:, :4, :8], bits)
    assert inputs[:, 4].sum(-1).eq(1).all()
    assert inputs[:, 4, 8].eq(1).all()
    assert inputs[:, 5:].eq(0).all()
    assert {len(ntm.batch(0, step, 2)[1][0]) for step in range(400)} == set(range(1, 21))
    assert not torch.equal(ntm.batch(0, 3, 2)[0][:, :2], ntm.batch(1, 3, 2)[0][:, :2])


def test_a_stopped_run_continues_to_the_same_weights(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ntm, "LENGTHS", (1, 2))

    def run(folder, steps):
        ntm.main(tmp_path / folder, steps=steps, batch_size=2, learning_rate=1e-2, seed=0, strings=4)
        return (latest_checkpoint(tmp_path / folder) / "model.safetensors").read_bytes()

    run("cut", 2)
    assert run("cut", 4) == run("whole", 4)
    stored = json.loads((tmp_path / "cut" / "copy.json").read_text())
    assert [row["vectors"] for row in stored["lengths"]] == [1, 2]
    assert all(0 <= row["exact"] <= row["bits"] <= 1 for row in stored["lengths"])
    assert stored["steps"] == 4
    assert "vectors" in capsys.readouterr().out


def test_the_cost_of_a_step_is_measured(monkeypatch):
    monkeypatch.setattr(sequential, "POSITIONS", 64)
    monkeypatch.setattr(sequential, "STEPS", 2)
    for name in ("pmnet", "ntm"):
        found = sequential.cost(name, 16)
        assert (found["name"], found["rows"], len(found["seconds"])) == (name, 4, 2)
        assert found["bytes_per_second"] == 64 / (sum(found["seconds"]) / 2)
        assert found["peak_bytes"] >= 0
