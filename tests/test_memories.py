"""PMNets with another memory: the parallel form against a loop, chunks, padding, documents, causality."""

import pytest
import torch

from pmnet.baselines import VariantConfig, VariantForCausalLM
from pmnet.baselines.memories import KINDS, PlainWrite, accumulate
from pmnet.memory import Tokens, Visit, empty_memory
from pmnet.model import PMNetCache
from pmnet.ops import to_angle
from tests.conftest import random_ids, read, small_config

pytestmark = pytest.mark.parametrize("kind", KINDS)
CLOSE = 2e-5  # float32 sums of a different order


def variant(kind: str, shape: str = "deep") -> VariantForCausalLM:
    facts = {**small_config(shape).to_dict(), "model_type": VariantConfig.model_type, "memory_kind": kind}
    torch.manual_seed(0)
    model = VariantForCausalLM(VariantConfig.from_dict(facts)).eval()
    for parameter in model.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return model


def loop(written, decay, groups, before, documents, valid):
    """The recurrence, position by position."""
    rows = []
    for b in range(len(groups)):
        state, current, seen = before[b], 0, []
        for t in range(groups.shape[1]):
            if documents[b, t] != current:
                state, current = torch.zeros_like(state), int(documents[b, t])
            chosen = torch.arange(len(state)) == groups[b, t]
            new = decay[b, t].exp() * state + written[b, t]
            state = torch.where((chosen & valid[b, t]).unsqueeze(1), new, state)
            seen.append(state[groups[b, t]])
        rows.append((torch.stack(seen), state))
    states, after = zip(*rows, strict=True)
    return torch.stack(states), torch.stack(after)


def test_values_and_gradients_are_those_of_a_loop(kind):
    random = torch.Generator().manual_seed(0)
    written = torch.randn(3, 17, 5, generator=random, dtype=torch.float64, requires_grad=True)
    decay = -torch.rand(3, 17, generator=random, dtype=torch.float64) * (kind != "real")
    decay.requires_grad_()
    before = torch.randn(3, 4, 5, generator=random, dtype=torch.float64, requires_grad=True)
    groups = torch.randint(0, 4, (3, 17), generator=random)
    documents = torch.tensor([[0] * 17, [0] * 6 + [1] * 11, [1] * 9 + [2] * 8])
    valid = torch.ones(3, 17, dtype=torch.bool)
    valid[0, 12:] = False
    got = accumulate(written, decay, groups, before, Tokens(valid, documents), scale_gradient=False)
    expected = loop(written, decay, groups, before, documents, valid)
    for ours, oracle, mask in ((got[0], expected[0], valid), (got[1], expected[1], slice(None))):
        assert torch.allclose(ours[mask], oracle[mask], atol=1e-12)
    upstream = [torch.randn(x.shape, generator=random, dtype=torch.float64) for x in expected]
    upstream[0] = upstream[0] * valid.unsqueeze(2)
    inputs = (written, decay, before)
    ours, oracle = (torch.autograd.grad(outputs, inputs, upstream, retain_graph=True) for outputs in (got, expected))
    for one, other in zip(ours, oracle, strict=True):
        assert torch.allclose(one, other, atol=1e-12)
    scaled, _ = accumulate(written, decay, groups, before, Tokens(valid, documents), scale_gradient=True)
    assert torch.equal(scaled, got[0])
    count = torch.stack([
        (groups[b] == groups[b, t]) & (documents[b] == documents[b, t]) & valid[b]
        for b in range(3) for t in range(17)
    ]).sum(1).view(3, 17, 1)  # fmt: skip
    plain = torch.autograd.grad(got[0], written, upstream[0])[0]
    (factored,) = torch.autograd.grad(scaled, written, upstream[0])
    assert torch.allclose(factored[valid], (plain / count.sqrt())[valid], atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 7])
def test_chunks_agree_with_one_pass(kind, shape, chunks):
    model, ids = variant(kind, shape), random_ids(2, 24)
    whole, one = read(model, ids, 24)
    parts, other = read(model, ids, chunks)
    assert torch.allclose(whole, parts, atol=CLOSE)
    for x, y in zip(one.memory, other.memory, strict=True):
        assert x.dtype == torch.int32
        assert torch.allclose(x.view(torch.float32), y.view(torch.float32), atol=CLOSE)
    assert one.memory[0].view(torch.float32).abs().max() > 0.1


def test_the_future_changes_nothing_before_it(kind, shape):
    model, ids = variant(kind, shape), random_ids(1, 20)
    other = ids.clone()
    other[:, 11] = (other[:, 11] + 1) % 256
    with torch.no_grad():
        one, two = (model(x, use_cache=False).logits for x in (ids, other))
    assert torch.equal(one[:, :11], two[:, :11])
    assert not torch.allclose(one[:, 19], two[:, 19], atol=CLOSE)  # beyond attention: through the memory


def test_padding_and_documents_are_rows_of_their_own(kind, shape):
    model, ids = variant(kind, shape), random_ids(1, 20)
    mask = torch.ones(1, 20, dtype=torch.long)
    mask[:, [0, 1, 9, 19]] = 0
    cache = PMNetCache(model.config)
    with torch.no_grad():
        padded = model(ids, attention_mask=mask, past_key_values=cache).logits[mask.bool()]
        alone, kept = read(model, ids[mask.bool()][None], 16)
        assert torch.allclose(padded, alone[0], atol=CLOSE)
        for x, y in zip(cache.memory, kept.memory, strict=True):
            assert torch.allclose(x.view(torch.float32), y.view(torch.float32), atol=CLOSE)
        packed = model(ids, document_ids=torch.tensor([[3] * 8 + [5] * 12]), use_cache=False).logits
        first, second = (model(part, use_cache=False).logits for part in (ids[:, :8], ids[:, 8:]))
    assert torch.allclose(packed, torch.cat([first, second], 1), atol=CLOSE)


def test_half_precision_keeps_the_sums(kind):
    model, ids = variant(kind), random_ids(2, 200)
    hidden = model.model.embed_tokens(ids).to(torch.bfloat16)
    write, anchors = model.model.layers[0].memory_write_module, model.model.memory_embeddings[0]
    root = Visit(torch.zeros_like(ids), None)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        *_, memory = write(hidden, root, anchors, empty_memory(model.config, 2)[0], Tokens(None, None))
        weights, raw = write.propose(hidden, root, anchors)
        decay = write.decay(hidden)
    written = (weights.unsqueeze(-1) * to_angle(raw).unsqueeze(2)).double()
    later = decay.double().sum(1, keepdim=True) - decay.double().cumsum(1)
    expected = (later.exp()[..., None, None] * written).sum(1)
    assert torch.allclose(memory.view(torch.float32)[:, 0].double(), expected, atol=1e-4)
    assert model.to(torch.bfloat16)(ids, use_cache=False).logits.isfinite().all()


def test_without_recurrence_states_are_single_writes(kind):
    model, ids = variant(kind), random_ids(1, 30)
    model.config.memory_cumsum = False
    cut, cache = read(model, ids, 30)
    assert all(not level.any() for level in cache.memory)
    model.config.memory_cumsum = True
    whole, _ = read(model, ids, 30)
    assert torch.allclose(cut[:, 0], whole[:, 0], atol=CLOSE)
    assert not torch.allclose(cut[:, 29], whole[:, 29], atol=1e-3)


def test_gates_begin_almost_open(kind):
    model = variant(kind)
    write = model.model.layers[0].memory_write_module
    assert isinstance(write, PlainWrite)
    kept = write.decay(torch.randn(4, 50, model.config.hidden_size)).exp()
    low, high = (1.0, 1.0) if kind == "real" else (0.9, 0.999)
    assert low <= kept.min() <= kept.max() <= high
    with pytest.raises(ValueError, match="memory_kind"):
        VariantConfig(memory_kind="wet")


def test_only_what_fades_is_read_as_a_circle(kind):
    model, ids = variant(kind), random_ids(1, 1)
    for write in (module for module in model.modules() if isinstance(module, PlainWrite)):
        write.decay = lambda hidden: torch.zeros(hidden.shape[:2])
    logits = []
    for turns in (0, 1):
        cache = PMNetCache(model.config)
        for level in cache.memory:
            level.view(torch.float32).fill_(0.5 + 2 * torch.pi * turns)
        with torch.no_grad():
            logits.append(model(ids, past_key_values=cache).logits)
    assert torch.allclose(*logits, atol=CLOSE) == (kind == "fading")
