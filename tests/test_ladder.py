"""Ladders: stages climbed by accuracy, drawn from a seed, the same stage in every process."""

import json
import math
from dataclasses import replace

import pytest
import torch

from pmnet.model import PMNetForCausalLM
from pmnet.model.tokenizer import EOS, PASTE
from pmnet.train.ladders import CURRICULA, build_ladder
from pmnet.train.loop import loss_of
from pmnet.train.recipes import RECIPES


def test_a_ladder_is_climbed_by_accuracy_or_when_time_is_up():
    plan = replace(RECIPES["copy-paste"]["demo"](), size=4, batch_size=8)
    source, gaps = build_ladder("copy-paste", plan), []
    assert len(source.stages) == 6 + 2 + 3
    for index in range(1000):
        ids = source.batch(index)["input_ids"]
        gap = (ids == PASTE).long().argmax(1) - (ids == EOS).long().argmax(1) - 1
        gaps.append((source.stage == len(source.stages), gap.min().item(), gap.max().item(), len(ids)))
        source.observe(1.0)
    assert source.stage == len(source.stages)
    assert all(least >= 15 for last, least, _, _ in gaps if not last)  # the memory is the only way while it is learned
    final = [row for row in gaps if row[0]]
    assert 0.05 < sum(least < 15 for _, least, _, _ in final) / len(final) < 0.25
    assert 0.15 < sum(most > 30 for _, _, most, _ in final) / len(final) < 0.4
    assert {rows for *_, rows in final} == {8, 2}
    stuck = build_ladder("copy-paste", replace(plan, steps=220))
    stages = []
    for index in range(112):
        stuck.batch(index)
        stuck.observe(0.0)
        stages.append(stuck.stage)
    assert stages[9] == 1
    assert stages[-1] == len(stuck.stages)


def test_seeds_draw_different_batches():
    """A generator keeps 32 bits of its seed, so a seed above them would give every run the same data."""
    plan = RECIPES["copy-paste"]["demo"]()
    first = [build_ladder("copy-paste", replace(plan, seed=seed)).batch(3)["input_ids"] for seed in (0, 0, 1, 2)]
    assert torch.equal(first[0], first[1])
    assert not any(a.shape == b.shape and torch.equal(a, b) for a, b in (first[1:3], first[2:4]))


@pytest.mark.parametrize("name", list(CURRICULA))
def test_every_task_trains_and_a_ladder_resumes(name):
    plan = replace(RECIPES[name]["demo"](), batch_size=4)
    source, model = build_ladder(name, plan), PMNetForCausalLM(plan.model).train()
    loss, _ = loss_of(model, source.batch(0))
    loss.backward()
    assert loss.item() == pytest.approx(math.log(plan.model.vocab_size), abs=1.0)  # it knows nothing yet
    for index in range(40):
        source.batch(index)
        source.observe(0.9)
    other = build_ladder(name, plan)
    other.restore(json.loads(json.dumps(source.state())))
    for index in range(40, 50):
        one, two = source.batch(index), other.batch(index)
        assert all(torch.equal(one[key], two[key]) for key in one)
        source.observe(0.5)
        other.observe(0.5)
    assert source.state() == other.state()


def test_processes_climb_together_on_batches_of_their_own():
    """Two ranks that observe the same numbers review in the same steps, and end on the same stage."""
    plan = replace(RECIPES["copy-paste"]["demo"](), size=4, batch_size=8)
    ranks = [build_ladder("copy-paste", plan, 2) for _ in range(2)]
    reviews = 0
    for step in range(200):
        first, second = (ladder.batch(2 * step + rank)["input_ids"] for rank, ladder in enumerate(ranks))
        assert not (first.shape == second.shape and torch.equal(first, second))
        reviews += not ranks[0].current
        for ladder in ranks:
            ladder.observe(0.99)
        assert ranks[0].state() == ranks[1].state()
    assert reviews > 10
    assert ranks[0].stage > 3


def test_recall_begins_with_one_pair_of_few_symbols_asked_anywhere():
    ladder = build_ladder("recall", replace(RECIPES["recall"]["demo"](), size=4))
    found = [(stage.pairs, stage.symbols) for stage in ladder.stages]
    assert found == [(1, 4), (1, 16), (1, 64), (1, None), (2, 4), (2, 16), (2, 64), (2, None), (3, None), (4, None)]
    assert [stage.mixed for stage in ladder.stages] == [True] * 8 + [False] * 2
    assert {stage.power for stage in ladder.stages} == {1.0}
    assert [(part.problem.pairs, part.problem.power) for part in ladder.mixture] == [
        (3, 0.01), (3, 1.0), (4, 0.01), (4, 1.0),
    ]  # fmt: skip


def test_a_task_grows_to_the_size_that_was_asked_for():
    for name, size, grown in (("needle", 700, "length"), ("needle", 2000, "length"), ("recall", 100, "pairs")):
        ladder = build_ladder(name, replace(RECIPES[name]["demo"](), size=size))
        assert getattr(ladder.mixture[-1].problem, grown) == size


@pytest.mark.parametrize("name", ["lookup", "recall", "selective-copy", "needle"])
def test_only_copy_paste_is_bound_by_the_gap(name):
    plan = replace(RECIPES[name]["demo"](), gap=10**6)
    assert build_ladder(name, plan).batch(0)["input_ids"].numel()
    with pytest.raises(ValueError, match=r"gap \(reach of the window\) is at most 65,536 in training, got 1,000,000"):
        build_ladder("copy-paste", replace(plan, size=8))
