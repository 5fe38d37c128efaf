"""Controls: as large as the model they stand beside, trained by the same loop, loaded by their folder."""

from dataclasses import replace

import pytest
import torch

from pmnet.baselines import CONTROLS, control, load_any
from pmnet.baselines.controls import parameters
from pmnet.data.tasks import CopyPaste
from pmnet.eval.retrieval import measure
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import train
from pmnet.train.recipes import RECIPES


@pytest.mark.parametrize("name", list(CONTROLS))
def test_controls_have_our_size_and_train(name, tmp_path):
    plan = replace(RECIPES["copy-paste"]["demo"](), steps=2, batch_size=4)
    size = parameters(plan.model)
    plan = replace(plan, model=control(name, plan.model))
    wanted = size * {"mamba2-3x": 3}.get(name, 1)
    assert abs(parameters(plan.model) - wanted) < (0.1 if name == "flat" else 0.01) * wanted
    trained = train(plan, build_ladder("copy-paste", plan), tmp_path / name)
    loaded = load_any(tmp_path / name / "model")
    ids = torch.randint(0, 256, (2, 30))
    with torch.no_grad():
        assert torch.equal(loaded(ids, use_cache=False).logits, trained(ids, use_cache=False).logits)
    assert measure(loaded, CopyPaste((2, 2), (30, 30)), 4, 0).strings == 4


@pytest.mark.parametrize("name", list(CONTROLS))
def test_controls_of_a_language_model_have_its_size(name):
    like = RECIPES["lm"]["tiny"]().model
    wanted = parameters(like) * {"mamba2-3x": 3}.get(name, 1)
    assert abs(parameters(control(name, like)) - wanted) < (0.1 if name == "flat" else 0.01) * wanted
