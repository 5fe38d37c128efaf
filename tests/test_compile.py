"""`torch.compile` and `torch.export`: one graph, no recompilation, the same numbers; and all backends agree."""

import itertools

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pmnet
from pmnet.model.decode_step import DecodeStep
from pmnet.ops import use_backend
from tests.conftest import assert_same_state, random_ids, small_model


@pytest.fixture(params=["torch", "native"])
def backend(request):
    torch._dynamo.reset()
    with use_backend(request.param):
        yield request.param
    torch._dynamo.reset()


def gradients(model):
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return found


def test_training_step(backend):
    model, counter = (
        small_model("period", memory_write_period=1, num_hidden_layers=2),
        CompileCounterWithBackend("aot_eager"),
    )
    model.train()
    graphs = []
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for length in (37, 50, 23):
        ids = random_ids(2, length)
        expected = model(ids, labels=ids)
        expected.loss.backward()
        plain = gradients(model)
        got = compiled(ids, labels=ids)
        got.loss.backward()
        if backend == "native":
            assert torch.equal(got.logits, expected.logits)
        assert torch.allclose(got.loss, expected.loss, rtol=1e-6)
        for name, gradient in gradients(model).items():
            assert (gradient - plain[name]).norm() <= 1e-5 * plain[name].norm(), name
        graphs.append(counter.frame_count)
    assert graphs == graphs[:1] * 3


@pytest.mark.parametrize("shape", ["period", "odd"])
def test_decode_step(shape, backend):
    """The state goes in and comes out of one graph, which serves every further step."""
    model, ids, counter = small_model(shape), random_ids(2, 30), CompileCounterWithBackend("aot_eager")
    cache = pmnet.PMNetCache(model.config, 2)
    compiled = torch.compile(
        lambda token, state: model(token, past_key_values=state).logits, fullgraph=True, backend=counter
    )
    with torch.no_grad():
        model(ids[:, :20], past_key_values=cache)
        traced = cache.clone()
        for t in range(20, 30):
            expected = model(ids[:, t : t + 1], past_key_values=cache).logits
            got = compiled(ids[:, t : t + 1], traced)
            if backend == "native":
                assert torch.equal(got, expected)
            else:
                assert (got - expected).norm() < 2e-5 * expected.norm()
    assert_same_state(traced, cache)
    assert cache.columns == traced.columns
    assert counter.frame_count <= 2  # the second time, the number of positions read is no longer a constant


@pytest.mark.parametrize("shape", ["period", "odd"])
def test_exported_decode_step(shape, backend):
    model, ids = small_model(shape), random_ids(2, 26)
    with torch.no_grad():
        fresh = pmnet.PMNetCache(model.config, 2).tensors()
        program = torch.export.export(DecodeStep(model), (ids[:, :1], fresh)).module()
        for run, prefix in itertools.product((program, DecodeStep(model)), (0, 20)):
            cache = pmnet.PMNetCache(model.config, 2)  # an empty state is a state like any other
            if prefix:
                model(ids[:, 1:prefix], past_key_values=cache)
            state = cache.clone().tensors()
            for t in range(prefix, prefix + 6):
                before = [tensor.clone() for tensor in state]
                logits, after = run(ids[:, t : t + 1], state)
                assert all(torch.equal(a, b) for a, b in zip(state, before, strict=True))
                expected = model(ids[:, t : t + 1], past_key_values=cache).logits
                if backend == "native":
                    assert torch.equal(logits, expected)
                else:
                    assert (logits - expected).norm() < 2e-5 * expected.norm()
                state = after
            assert_same_state(pmnet.PMNetCache.from_tensors(model.config, state, cache.columns), cache)


@pytest.mark.parametrize("shape", ["period", "odd"])
def test_backends_agree(shape):
    """Logits and every gradient; sums are taken in another order, nothing more."""
    model, ids = small_model(shape, phase_bits=32, sliding_window=5).train(), random_ids(2, 20)
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, :5] = 0
    found = {}
    for name in ("torch", "native", "triton"):
        with use_backend(name):
            out = model(ids, attention_mask=mask)
            torch.nn.functional.cross_entropy(out.logits[:, 5:-1].flatten(0, 1), ids[:, 6:].flatten()).backward()
        found[name] = out.logits[mask == 1].detach(), gradients(model)
    logits, plain = found["torch"]
    for name in ("native", "triton"):
        assert (found[name][0] - logits).norm() < 1e-5 * logits.norm(), name
        for weight, gradient in found[name][1].items():
            assert (gradient - plain[weight]).norm() < 1e-4 * plain[weight].norm(), (name, weight)
