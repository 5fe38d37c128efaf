"""Controls: as large as the model they stand beside, trained by the same loop, loaded by their folder."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM

from pmnet.baselines import CONTROLS, control, load_any, matrix_scan
from pmnet.baselines.controls import parameters
from pmnet.data.tasks import CopyPaste
from pmnet.eval.retrieval import measure
from pmnet.train.ladders import build_ladder
from pmnet.train.loop import train
from pmnet.train.optimizers import build_optimizers
from pmnet.train.recipes import RECIPES
from tests.conftest import small_config


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


def test_decay_rates_of_a_mamba_do_not_decay():
    plan = RECIPES["copy-paste"]["demo"]()
    model = AutoModelForCausalLM.from_config(control("mamba", plan.model))
    rates = {id(p) for name, p in model.named_parameters() if name.endswith("A_log")}
    groups = [group for optimizer in build_optimizers(model, plan) for group in optimizer.param_groups]
    decays = {group["weight_decay"] for group in groups for p in group["params"] if id(p) in rates}
    assert rates
    assert decays == {0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("name", ["llama", "sliding-window"])
def test_transformers_turn_their_heads_as_we_do(name):
    like = small_config("deep", rope_theta=345.0, rms_norm_eps=1e-3)
    config = control(name, like)
    model = AutoModelForCausalLM.from_config(config)
    assert config.rms_norm_eps == 1e-3
    expected = 345.0 ** (-torch.arange(0, like.head_dim, 2) / like.head_dim)
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, expected)


def test_a_mamba2_in_half_precision_is_measured_as_the_library_reads_it(tmp_path):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(control("mamba2", small_config("deep"))).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    model, ids = load_any(tmp_path).eval(), torch.randint(0, 256, (2, 70))
    assert model.dtype == torch.bfloat16
    exact = load_any(tmp_path).float().eval()
    with torch.no_grad():
        expected, library = exact(ids, use_cache=False).logits, model(ids, use_cache=False).logits
        with matrix_scan(model):
            found = model(ids, use_cache=False).logits
    assert (found - expected).abs().mean() <= 1.5 * (library - expected).abs().mean()


def test_an_lstm_trains_under_autocast(tmp_path):
    plan = RECIPES["copy-paste"]["demo"]()
    plan = replace(plan, steps=1, batch_size=2, precision="bf16", model=control("lstm", plan.model))
    assert train(plan, build_ladder("copy-paste", plan), tmp_path / "run").dtype == torch.float32
