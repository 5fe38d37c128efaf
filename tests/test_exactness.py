"""One state in three bit-identical forms: parallel, chunked, token by token; whatever the padding and neighbours."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pmnet
from pmnet.ops import row_stable_linear, use_backend
from tests.conftest import SHAPES, assert_same_state, random_ids, read, small_model

MODELS = {(shape, attention): small_model(shape, attn_implementation=attention)
          for shape in SHAPES for attention in ("eager", "sdpa")}  # fmt: skip
SMALL = [(1, 1), (9, 1), (1, 9), (2, 2), (16, 48), (37, 22)]  # depth and width of linear maps
LOGIT_BUDGET = 2e-5  # relative norm, between the three forms in plain torch; the same bits in native code


@pytest.fixture(params=["torch", "native"])
def backend(request):
    with use_backend(request.param):
        yield request.param


def assert_same_logits(got, expected, backend):
    if backend == "native":
        assert torch.equal(got, expected)
    else:
        assert relative(got, expected) < LOGIT_BUDGET


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("threads", [1, 2, 4])
@pytest.mark.parametrize(
    ("depth", "width"),
    [(16, 48), (37, 22), (1, 1), (9, 1), (1, 9), (2, 2), (256, 64), (700, 320), (1100, 512), (2048, 512)],
)
def test_a_linear_row_does_not_depend_on_the_number_of_rows(depth, width, threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x, weight = torch.randn(600, depth), torch.randn(width, depth)
        whole = row_stable_linear(x, weight)
        for rows in (1, 2, 3, 7, 15, 16, 17, 31, 64, 100, 257, 511):
            assert torch.equal(row_stable_linear(x[5 : 5 + rows], weight), whole[5 : 5 + rows]), rows
        assert relative(whole, torch.nn.functional.linear(x.double(), weight.double())) < 1e-6
    finally:
        torch.set_num_threads(before)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(sorted(MODELS)), st.sampled_from(["torch", "native"]), st.integers(0, 10**6), st.data())
def test_random_chunks_and_neighbours(key, backend, seed, data):
    with use_backend(backend):
        check_chunks_and_neighbours(MODELS[key], backend, seed, data)


def check_chunks_and_neighbours(model, backend, seed, data):
    length = data.draw(st.integers(2, 70))
    ids = random_ids(2, length, seed)
    chunks = []
    while sum(chunks) < length:
        chunks.append(data.draw(st.integers(1, length - sum(chunks))))
    logits, whole = read(model, ids, [length])
    pieces, cut = read(model, ids, chunks)
    assert_same_state(cut, whole)
    assert_same_logits(pieces, logits, backend)
    alone, single = read(model, ids[1:], chunks)
    assert_same_logits(alone, logits[1:], backend)
    whole.batch_select_indices(torch.tensor([1]))
    assert_same_state(single, whole)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_token_by_token(shape, attention, backend):
    model, ids = MODELS[shape, attention], random_ids(2, 61)
    logits, whole = read(model, ids, [61])
    steps, stepped = read(model, ids, [1] * 61)
    assert_same_state(stepped, whole)
    assert_same_logits(steps, logits, backend)


def test_training_form_is_the_same_function(shape, backend):
    model, ids = MODELS[shape, "sdpa"], random_ids(2, 50)
    with torch.no_grad():
        plain = model(ids, use_cache=False).logits
    assert torch.equal(plain, read(model, ids, [50])[0])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padding_anywhere_equals_the_row_alone(shape, attention, backend):
    model = MODELS[shape, attention]
    mask = torch.ones(4, 40, dtype=torch.long)
    mask[0, :33] = 0
    mask[1, 25:] = 0
    mask[2, ::3] = 0
    ids = random_ids(4, 40)
    cache = pmnet.PMNetCache(model.config, 4)
    tail = random_ids(4, 7, seed=1)
    with torch.no_grad():
        logits = model(ids, attention_mask=mask, past_key_values=cache).logits
        more = model(tail, past_key_values=cache).logits
    for row in range(4):
        kept = mask[row] == 1
        alone, single = read(model, torch.cat([ids[row][kept], tail[row]])[None], [int(kept.sum()), 7])
        assert torch.equal(torch.cat([logits[row][kept], more[row]]), alone[0])
        picked = cache.clone()
        picked.batch_select_indices(torch.tensor([row]))
        assert_same_state(picked, single)


@pytest.mark.parametrize("how", ["position_ids", "document_ids"])
def test_packed_documents_equal_separate_ones(shape, how, backend):
    model, lengths = MODELS[shape, "sdpa"], [3, 30, 1, 19]
    ids = random_ids(1, sum(lengths))
    if how == "position_ids":
        marks = torch.cat([torch.arange(n) for n in lengths])[None]
    else:
        marks = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    with torch.no_grad():
        packed = model(ids, **{how: marks}, use_cache=True)
    separate = [read(model, part, [part.shape[1]]) for part in ids.split(lengths, dim=1)]
    assert_same_logits(packed.logits, torch.cat([logits for logits, _ in separate], dim=1), backend)
    for ours, last in zip(packed.past_key_values.memory, separate[-1][1].memory, strict=True):
        assert (ours - last).abs().max() <= (0 if backend == "native" else 2**32 * 1e-5)


def test_packed_documents_do_not_leak(shape, backend):
    """Changing one document changes no bit of another, in parallel or across chunks."""
    model, lengths = MODELS[shape, "sdpa"], [20, 31]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    ids = random_ids(1, 51)
    other = ids.clone()
    other[:, :20] = random_ids(1, 20, seed=5)
    results = []
    for text in (ids, other):
        cache = pmnet.PMNetCache(model.config)
        with torch.no_grad():
            parts = [
                model(text[:, a:b], position_ids=positions[:, a:b], past_key_values=cache).logits
                for a, b in ((0, 8), (8, 27), (27, 51))
            ]
        results.append((torch.cat(parts, dim=1)[:, 20:], cache))
    assert torch.equal(results[0][0], results[1][0])
    assert_same_state(results[0][1], results[1][1])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_causality_is_exact(shape, attention, backend):
    model, ids = MODELS[shape, attention], random_ids(1, 48)
    with torch.no_grad():
        before = model(ids).logits
        for t in (0, 17, 47):
            changed = ids.clone()
            changed[0, t] = (changed[0, t] + 1) % 256
            after = model(changed).logits
            assert torch.equal(after[:, :t], before[:, :t])
            assert not torch.equal(after[:, t:], before[:, t:])


def test_memory_reaches_where_attention_cannot(shape, backend):
    model = MODELS[shape, "sdpa"]
    ids = random_ids(1, 3 * model.config.receptive_field + 5)
    changed = ids.clone()
    changed[0, 0] = (changed[0, 0] + 1) % 256
    with torch.no_grad():
        moved = (model(ids).logits[:, -1] - model(changed).logits[:, -1]).abs().max()
        model.config.memory_cumsum = False
        try:
            still = (model(ids).logits[:, -1] - model(changed).logits[:, -1]).abs().max()
        finally:
            model.config.memory_cumsum = True
    assert moved > 0
    assert still == 0


def test_far_positions_are_as_exact_as_near_ones():
    """Rotary positions are relative: shifting all of them by ten million changes logits by rounding only."""
    model, ids = MODELS["wide", "eager"], random_ids(1, 40)
    positions = torch.arange(40)[None]
    with torch.no_grad():
        near, far = model(ids, position_ids=positions).logits, model(ids, position_ids=positions + 10**7).logits
    assert relative(far, near) < LOGIT_BUDGET


def test_attention_cost_grows_linearly():
    """Floating point operations of twice the length are at most 2.2 times as many."""
    from torch.utils.flop_counter import FlopCounterMode

    model, counts = MODELS["wide", "eager"], []
    for length in (512, 1024):
        with FlopCounterMode(display=False) as counter, torch.no_grad(), use_backend("torch"):  # it counts torch only
            model(random_ids(1, length), use_cache=False)
        counts.append(counter.get_total_flops())
    assert counts[1] < 2.2 * counts[0]
