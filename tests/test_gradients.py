"""`pmnet eval gradients`: each measurement against another way to get the same number."""

import json
import math

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from benchmarks.published import global_scan
from pmnet.baselines import LSTMConfig, LSTMForCausalLM, control
from pmnet.baselines.memories import VariantConfig, VariantForCausalLM
from pmnet.data.tasks import CopyPaste, training_batch
from pmnet.eval.gradients import jacobian as through_time
from pmnet.eval.gradients import precision, saturation, training, trees
from pmnet.eval.gradients.recurrences import recurrence
from pmnet.model import PMNetCache, PMNetForCausalLM
from pmnet.ops import phase_write, to_radians, to_turns
from pmnet.train.loop import loss_of
from pmnet.train.recipes import demo_model
from tests.conftest import random_ids, run_cli, small_config, small_model

# PyTorch's own forward mode compiles its rules with what PyTorch has deprecated
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")


@pytest.mark.parametrize("name", ["lstm", "ntm", "mamba"])
def test_recurrences_are_those_of_the_models(name):
    torch.manual_seed(0)
    model, ids = AutoModelForCausalLM.from_config(control(name, demo_model())).eval(), random_ids(2, 12)
    one = recurrence(model)
    state, logits = one.start(2), []
    with torch.no_grad():
        for column in ids.unbind(1):
            row, state = one.step(column, state)
            logits.append(row)
        expected = model(ids).logits
    assert torch.allclose(torch.stack(logits, 1), expected, atol=1e-5)


def test_the_forward_gain_is_that_of_the_full_jacobian():
    torch.manual_seed(0)
    one = recurrence(LSTMForCausalLM(LSTMConfig(vocab_size=300, hidden_size=3)).eval())
    ids = random_ids(1, through_time.WARM + 4)
    curve = through_time.forward_gain(one, ids, torch.Generator().manual_seed(5))
    generator = torch.Generator().manual_seed(5)
    direction = torch.cat([torch.randn(1, 3, generator=generator) for _ in range(4)], 1)[0]
    with torch.no_grad():
        state = one.start(1)
        for column in ids[:, : through_time.WARM].unbind(1):
            state = one.step(column, state)[1]

    def later(flat):
        parts = flat.view(4, 1, 3).unbind(0)
        for column in ids[:, through_time.WARM :].unbind(1):
            parts = one.step(column, tuple(parts))[1]
        return torch.cat(parts, 1)[0]

    full = torch.autograd.functional.jacobian(later, torch.cat(state, 1)[0])
    expected = (full @ direction).norm() / direction.norm()
    assert [point["n"] for point in curve] == [1, 2, 4]
    assert curve[-1]["median"] == pytest.approx(float(expected.log10()), abs=1e-4)


def test_the_loss_gradient_is_that_of_autograd_through_the_start():
    torch.manual_seed(0)
    one = recurrence(LSTMForCausalLM(LSTMConfig(vocab_size=300, hidden_size=3)).eval())
    ids = random_ids(1, through_time.WARM + 3)
    curve = through_time.loss_gradient(one, ids)
    with torch.no_grad():
        state = one.start(1)
        for column in ids[:, : through_time.WARM].unbind(1):
            state = one.step(column, state)[1]
    state = [part.requires_grad_() for part in state]
    logits, after = one.step(ids[:, -3], tuple(state))
    logits, _ = one.step(ids[:, -2], after)
    grads = torch.autograd.grad(F.cross_entropy(logits, ids[:, -1]), state)
    found = next(point for point in curve if point["n"] == 2)
    assert found["median"] == pytest.approx(float(torch.cat(grads, 1).norm().log10()), abs=1e-4)


def test_the_backward_of_a_phase_write_is_the_identity_to_the_bit():
    random = torch.Generator().manual_seed(0)
    weights = torch.rand(2, 40, 3, generator=random)
    raw = torch.randn(2, 40, 5, generator=random)
    groups = torch.randint(0, 4, (2, 40), generator=random)
    memory = torch.zeros(2, 4, 3, 5, dtype=torch.int32)
    shift = torch.randint(-(2**31), 2**31, (2, 4, 3, 5), generator=random).int()
    _, plain = phase_write(weights, raw, groups, memory, phase_bits=7)
    _, moved = phase_write(weights, raw, groups, shift, phase_bits=7)
    assert torch.equal(moved - plain, shift)
    upstream = torch.zeros(2, 40, 3, 5)
    upstream[:, -1] = torch.randn(2, 3, 5, generator=random)  # at the last position only
    level = trees.Level(None, groups, None, torch.zeros_like(upstream), None)
    pulled = level.to_states(upstream)
    same = (groups == groups[:, -1:])[..., None, None]
    assert torch.equal(pulled, torch.where(same, upstream[:, -1:], 0.0))


@pytest.mark.parametrize("shape", ["deep", "period"])
def test_a_phase_memory_forgets_nothing(shape):
    model = small_model(shape)
    found = through_time.jacobian(model, 64, 2, 0)
    assert found["shift_exact"] == [True] * model.config.num_levels
    for name, curve in found["curves"].items():
        if name.startswith("state"):
            assert all(point["median"] in (0.0, None) for point in curve)
            assert any(point["median"] == 0.0 for point in curve)


def variant(kind: str) -> VariantForCausalLM:
    torch.manual_seed(0)
    facts = {**small_config("deep").to_dict(), "model_type": VariantConfig.model_type, "memory_kind": kind}
    return VariantForCausalLM(VariantConfig.from_dict(facts)).eval()


@pytest.mark.parametrize("kind", ["phase", "real", "gated", "fading"])
def test_gradients_of_states_are_differences_of_the_loss(kind):
    """The root is nudged in the streaming state, where no gradient is involved."""
    model = small_model("deep", phase_bits=32) if kind == "phase" else variant(kind)
    ids, cut = random_ids(1, 24), 7
    logits, levels = trees.read_levels(model, ids[:, :-1])
    loss = F.cross_entropy(logits, ids[:, -1])
    gradient = torch.autograd.grad(loss, [level.field for level in levels])[0]
    pulled = levels[0].to_states(gradient)[0, cut - 1]
    step, losses = 0.02, []
    direction = pulled / pulled.norm()
    for sign in (1, -1):
        cache = PMNetCache(model.config)
        with torch.no_grad():
            model(ids[:, :cut], past_key_values=cache)
            nudge = sign * step * direction
            if kind == "phase":
                cache.memory[0][0, 0] += to_turns(nudge)
            else:
                cache.memory[0].view(torch.float32)[0, 0] += nudge
            after = model(ids[:, cut:-1], past_key_values=cache).logits[:, -1]
        losses.append(float(F.cross_entropy(after.double(), ids[:, -1])))
    assert (losses[0] - losses[1]) / (2 * step) == pytest.approx(float(pulled.norm()), rel=0.05)


def test_a_gate_forgets_what_it_says():
    model, ids = variant("gated"), random_ids(1, 30)
    _, levels = trees.read_levels(model, ids)
    along = torch.randn(levels[0].field.shape)
    along[:, :-1] = 0
    pulled = levels[0].to_states(along)
    kept = levels[0].decay.flip(1).cumsum(1).flip(1) - levels[0].decay
    expected = kept.exp()[..., None, None] * along[:, -1:]
    assert torch.allclose(pulled, expected, atol=1e-6)


def test_state_errors_grow_in_float32_and_not_on_the_circle():
    def published(rotation):
        groups = torch.zeros(rotation.shape[:2], dtype=torch.int64)
        return global_scan(rotation.unsqueeze(2), groups, 1, None, False)[0].squeeze(2)

    forms = {"exact": (precision.exact, 10**9), "sum": (precision.cumulative, 10**9), "published": (published, 10**9),
             "half": (precision.half, 500)}  # fmt: skip
    rows = precision.state_errors(forms, [500, 20_000], 2, 4, 1)
    found = {(row["form"], row["length"]): row for row in rows}
    assert len(rows) == 7
    assert found["exact", 20_000]["max"] < 20_000 * math.pi / 2**32
    assert found["sum", 20_000]["rms"] > 3 * found["sum", 500]["rms"]
    assert found["half", 500]["rms"] > 0.01
    assert found["exact", 20_000]["neighbours"] == 0
    assert found["published", 20_000]["neighbours"] > 0


def test_training_is_summarised():
    losses, norms = training.run(demo_model(), training.Trial(40, 1e-3, steps=3, rows=2))
    assert len(losses) == len(norms) == 3
    assert losses[0] == pytest.approx(math.log(384), abs=0.5)
    without, raised = training.run(demo_model(), training.Trial(40, 1e-3, factor=False, steps=1, rows=2))
    assert without[0] == losses[0]
    assert raised[0] != norms[0]
    other, _ = training.run(demo_model(), training.Trial(40, 1e-3, seed=1, steps=1, rows=2))
    assert other[0] != losses[0]
    told = training.summary([([5.0, 4.0], [1.0, 3.0]), ([5.0, math.nan], [2.0, math.nan])])
    assert (told["diverged"], told["max"], told["last_loss"]) == (1, 3.0, 4.0)
    assert training.summary([([5.0, 6.5], [1.0, 1.0])])["diverged"] == 1
    batch = training_batch(CopyPaste((8, 8), (20, 20)).draw(2, torch.Generator().manual_seed(0)))
    assert batch["input_ids"].shape[1] == 40 - 1  # T positions are 39 inputs and the last answer


def test_the_factor_is_what_is_switched_off():
    torch.manual_seed(0)
    model = PMNetForCausalLM(demo_model()).train()
    batch = precision.text_batch(2, 50, 0)

    def gradient():
        model.zero_grad()
        loss_of(model, batch)[0].backward()
        return model.model.layers[0].memory_write_module.proj_out.weight.grad.clone()

    scaled = gradient()
    model.model.layers[0].memory_write_module.eval()
    assert torch.allclose(gradient() / 50**0.5, scaled, rtol=1e-3, atol=1e-7)  # the root: every position visits it


def test_capacity_without_circle_or_rounding_is_the_theory():
    random = torch.Generator().manual_seed(0)
    for writes in (1, 4):
        codes = torch.randn(4000, 64, 16, generator=random)
        state = codes[:, 0] + (writes - 1) ** 0.5 * torch.randn(4000, 16, generator=random)
        right = (torch.einsum("tvm,tm->tv", codes, state).argmax(1) == 0).double().mean()
        assert float(right) == pytest.approx(saturation.superposition(16, writes, 64), abs=0.03)
    rows = saturation.capacity(8, 40, 0)
    assert {row["phase_bits"] for row in rows} == set(saturation.BITS)
    lost = [row for row in rows if row["phase_bits"] == 4 and row["scale"] == 0.05]
    assert all(row["accuracy"] < 0.1 for row in lost)  # rounded to nothing, nothing can be read


def test_the_expected_loss_of_dithered_rounding_is_the_mean_over_dithers():
    rotation, bits = torch.tensor([0.3, -0.7], dtype=torch.float64), 4
    step = 2 * math.pi / 2**bits
    noise = (torch.rand(200_000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 0.5) * step
    drawn = to_radians(to_turns(rotation + noise, bits).sum(1, dtype=torch.int32), torch.float64)
    below = (rotation / step).floor()
    share = rotation / step - below
    factors = torch.exp(1j * below * step) * (1 - share + share * torch.exp(torch.tensor(1j * step)))
    assert abs(torch.exp(1j * drawn).mean() - factors.prod()) < 0.01  # 200,000 draws: 0.002
    assert saturation.rounding_bias(16, 4, 0.3, 32, 0)["cosine"] == pytest.approx(1.0)
    coarse = saturation.rounding_bias(16, 64, 0.05, 4, 0)
    assert coarse["cosine"] < 0.95


def test_spread_is_none_at_first_and_model_bias_vanishes_at_32_bits():
    model = PMNetForCausalLM(demo_model()).eval()
    curve = saturation.spread(model, 8, 4, 0, "constant")
    assert [point["bytes"] for point in curve] == [1, 2, 4, 8]
    assert all(0 <= value <= 1 for point in curve for value in point["levels"])
    rows = saturation.model_bias(model.train(), precision.text_batch(2, 30, 0))
    assert rows[-1]["cosine"] == pytest.approx(1.0)
    assert rows[0]["cosine"] < rows[-1]["cosine"]
    assert model.config.phase_bits == demo_model().phase_bits


def test_the_commands_store_what_they_measured(tmp_path):
    small_model("deep").save_pretrained(tmp_path / "model")
    start = ["eval", "gradients"]
    save = ["--save", str(tmp_path)]
    runs = {
        "jacobian": [str(tmp_path / "model"), "--models", "lstm,gated-memory", "--positions", "4", "--rows", "1"],
        "training": ["--models", "pmnet,lstm", "--steps", "2", "--lengths", "60,30", "--seeds", "1", "--scales", "3"],
        "precision": ["--lengths", "200", "--steps", "2", "--seeds", "1"],
        "saturation": [str(tmp_path / "model"), "--longest", "8", "--rows", "2", "--trials", "4", "--seeds", "1"],
    }
    for name, arguments in runs.items():
        code, printed = run_cli([*start, name, *arguments, *save])
        assert code == 0, printed
        stored = json.loads((tmp_path / f"{name}.json").read_text())
        assert {"command", "commit", "versions", "machine"} <= set(stored)
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    models = json.loads((tmp_path / "jacobian.json").read_text())["models"]
    assert [(model["name"], bool(model["folder"])) for model in models] == [
        ("lstm", False), ("gated-memory", False), ("pmnet", True),
    ]  # fmt: skip
    assert [model["model"]["model_type"] for model in models] == ["pmnet-lstm", "pmnet-variant", "PMNet"]
    assert models[2]["model"]["hidden_size"] == small_config("deep").hidden_size
    stored = json.loads((tmp_path / "training.json").read_text())
    assert {(t["name"], t["total"], t["factor"], t["scale"]) for t in stored["trials"]} >= {
        ("pmnet", 60, False, 1.0), ("lstm", 30, True, 3.0),
    }  # fmt: skip
    kinds = {name: config["model_type"] for name, config in stored["models"].items()}
    assert kinds == {"pmnet": "PMNet", "lstm": "pmnet-lstm"}
    stored = json.loads((tmp_path / "saturation.json").read_text())
    assert [row["model"]["hidden_size"] for row in stored["spread"][::2]] == [64, small_config("deep").hidden_size]
    assert stored["model"]["hidden_size"] == demo_model().hidden_size


def test_without_recurrence_there_is_no_gradient_through_time():
    model = small_model("period")
    model.config.memory_cumsum = False
    with pytest.raises(ValueError, match="memory_cumsum is off"):
        through_time.jacobian(model, 8, 1, 0)
    with pytest.raises(ValueError, match="memory_cumsum is off"):
        saturation.spread(model, 8, 2, 0)
