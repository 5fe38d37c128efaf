"""The loss that teaches a memory to turn nothing for filler."""

from dataclasses import replace

import pytest
import torch

from pmnet.data.tasks import CopyPaste, filler_columns, training_batch
from pmnet.eval.traces import traced
from pmnet.memory import MemoryWrite
from pmnet.model.tokenizer import COPY, EOS, PASTE
from pmnet.train.loop import loss_of, train
from pmnet.train.quiet import quieted
from pmnet.train.recipes import RECIPES, Recipe
from tests.conftest import small_model
from tests.test_cli import fails


class Fixed:
    """The same task at every step, for `train`."""

    source = ""

    def __init__(self, problem):
        self.problem = problem

    def batch(self, index):
        return training_batch(self.problem.draw(4, torch.Generator().manual_seed(index)))

    def observe(self, correct):
        pass

    def state(self):
        return {}

    restore = observe


def test_filler_is_what_is_neither_marked_nor_in_a_string():
    ids = torch.tensor(
        [
            [7, 7, COPY, 7, 8, EOS, 9, PASTE, 7, 8],
            [COPY, 1, 2, EOS, 3, 4, 5, PASTE, 1, 2],
            [COPY, 1, 2, 3, EOS, PASTE, 1, 2, 3, EOS],
        ]
    )
    assert filler_columns(ids).int().tolist() == [
        [1, 1, 0, 0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 0, 1, 1, 1, 0, 0, 0],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]


def test_it_is_the_mean_rotation_of_filler():
    model = small_model("deep").train()
    batch = training_batch(CopyPaste((3, 3), (4, 9)).draw(5, torch.Generator().manual_seed(0)))
    plain, _ = loss_of(model, batch)
    loss, _ = quieted(loss_of, 0.5)(model, batch)
    with traced(model) as traces:
        model(batch["input_ids"], use_cache=False)
    filler = filler_columns(batch["input_ids"])
    expected = sum(write["theta"][filler].abs().mean() for write, _ in traces[1:])
    torch.testing.assert_close(loss - plain, 0.5 * expected, rtol=1e-4, atol=1e-6)
    assert all(not module._forward_hooks for module in model.modules())


def test_without_filler_nothing_is_added():
    model = small_model("deep").train()
    batch = training_batch(CopyPaste((3, 3), (0, 0)).draw(5, torch.Generator().manual_seed(0)))
    assert quieted(loss_of, 5.0)(model, batch)[0] == loss_of(model, batch)[0]


def test_training_with_it_makes_filler_turn_less(tmp_path):
    plan = replace(RECIPES["copy-paste"]["demo"](), steps=30, batch_size=4, warmup=1)
    problem, turned = CopyPaste((2, 2), (15, 20)), {}
    ids = problem.draw(8, torch.Generator().manual_seed(99)).dense()[0]
    for weight in (0.0, 1.0):
        model = train(replace(plan, quiet=weight), Fixed(problem), tmp_path / str(weight))
        with traced(model) as traces, torch.no_grad():
            model(ids, use_cache=False)
        turned[weight] = sum(float(write["theta"][filler_columns(ids)].abs().mean()) for write, _ in traces[1:])
    assert sum(isinstance(module, MemoryWrite) for module in model.modules()) == 2
    assert turned[1.0] < 0.5 * turned[0.0]


def test_what_cannot_be_quiet_is_named(tmp_path):
    common = ["--quiet", "1", "--steps", "1", "--out", tmp_path / "r"]
    fails(["train", "recall", *common], "--quiet", "recall")
    for other in ("llama", "flat"):
        fails(["train", "copy-paste", "--model", other, *common], "--quiet", other)
    fails(["train", "copy-paste", "--quiet", "inf", "--out", tmp_path / "r"], "quiet must be finite")
    fails(["train", "copy-paste", "--compile", *common], "quiet", "torch.compile")
    assert not (tmp_path / "r").exists()
    with pytest.raises(ValueError, match="quiet"):
        Recipe(model=RECIPES["copy-paste"]["demo"]().model, steps=1, quiet=1.0, compile=True)
