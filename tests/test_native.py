"""The C++ operators against float64, row by row, and at the ends of the number range.

An error is the root mean square of the difference from a float64 evaluation in plain torch: a maximum over few
elements is a matter of luck, a mean square is not. The budget is that of flash-attention, twice what plain torch loses
in float32, plus four roundings of the result: where that is one or two numbers, its mean is a matter of luck as well.
"""

import math

import pytest
import torch

from pmnet.ops import (
    address,
    geometry,
    norm_rotate,
    phase_scan,
    phase_write,
    read_slots,
    rotary_table,
    row_stable_linear,
    silu_product,
    to_radians,
    to_turns,
    use_backend,
    window_attention,
)
from tests.native_problems import EPS, integers, native_theta, norm_of, numbers, plain_attention, write_problem


def run(function, inputs, upstream, backend, dtype):
    """Results, then the gradients of all inputs, computed by a backend in a precision."""
    inputs = [x.to(dtype).clone().requires_grad_() for x in inputs]
    with use_backend(backend):
        out = function(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, upstream.to(dtype))]


def assert_within_budget(results, unit=0.0):
    """Native, plain and exact results; `unit` is the size of what they are small differences of."""
    for i, (ours, theirs, exact) in enumerate(zip(*results, strict=True)):
        assert ours.shape == exact.shape
        assert ours.dtype == torch.float32
        error, allowed, size = (x.double().square().mean().sqrt().item() for x in (ours - exact, theirs - exact, exact))
        assert error <= 2 * allowed + 4 * EPS * max(size, unit), (i, error, allowed, size)


def assert_accurate(function, inputs, truth_of=None, unit=0.0):
    """`function(*inputs)` and its gradients stay within the budget; `truth_of` is the same formula for torch."""
    formula = truth_of or function
    with torch.no_grad(), use_backend("torch"):
        upstream = numbers(*formula(*inputs).shape, seed=9)
    truth = run(formula, inputs, upstream, "torch", torch.float64)
    plain = run(formula, inputs, upstream, "torch", torch.float32)
    got = run(function, inputs, upstream, "native", torch.float32)
    assert_within_budget((got, plain, truth), unit)


# Accuracy, forward and backward


@pytest.mark.parametrize("width", [1, 6, 11, 22, 37, 300])
@pytest.mark.parametrize("length", [1, 17, 130])
def test_norm(width, length):
    assert_accurate(
        lambda x, weight: (
            torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-2)
            if x.dtype == torch.float64
            else norm_of(weight)(x)
        ),
        [numbers(2, length, width, scale=3.0), 1 + numbers(width, scale=0.2)],
    )


@pytest.mark.parametrize("width", [2, 6, 22, 38, 300])
@pytest.mark.parametrize(("batch", "length", "rows"), [(1, 1, 1), (3, 17, 1), (2, 63, 2), (2, 130, 1)])
def test_norm_and_rotation(width, batch, length, rows):
    positions = integers(10**6, rows, length)

    def rotated(x, weight):
        return norm_rotate(x, norm_of(weight), *rotary_table(positions, width, 1e4, x))

    assert_accurate(rotated, [numbers(batch, length, 3, width), 1 + numbers(width, scale=0.2)])


@pytest.mark.parametrize("width", [2, 6, 22, 38, 300])
def test_rotary_table_at_any_distance(width):
    positions = torch.cat([torch.arange(63), torch.tensor([10**6, 10**7 + 1, 2**40])])[None]
    with use_backend("native"):
        got = rotary_table(positions, width, 1e6, torch.zeros(1))
    with use_backend("torch"):
        expected = rotary_table(positions, width, 1e6, torch.zeros(1, dtype=torch.float64))
    near = positions[0] < 2**30  # beyond, a float64 angle itself has an error of 1e-4
    for ours, exact in zip(got, expected, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - exact)[:, near].abs().max() < 2e-7
        assert (ours - exact).abs().max() < 1e-3


@pytest.mark.parametrize("shape", [(1, 1, 1), (2, 17, 37), (3, 63, 11), (2, 130, 300)])
def test_silu_product(shape):
    assert_accurate(silu_product, [numbers(*shape, scale=4.0), numbers(*shape, seed=1)])


@pytest.mark.parametrize("window", [1, 9, 128])
@pytest.mark.parametrize("length", [1, 17, 63, 130])
@pytest.mark.parametrize(
    ("batch", "heads", "kv_heads", "width"), [(1, 2, 2, 8), (2, 4, 2, 6), (2, 6, 1, 22), (3, 3, 3, 37)]
)
def test_attention(window, length, batch, heads, kv_heads, width):
    past, scaling = window - 1, width**-0.5
    query = numbers(batch, length, heads, width, scale=2.0)
    keys, values = (numbers(batch, past + length, kv_heads, width, seed=seed) for seed in (1, 2))
    for rows in {1, batch}:
        span = 1 + integers(window, rows, length)
        assert_accurate(
            lambda q, k, v, span=span: window_attention(q, k, v, span, scaling),
            [query, keys, values],
            lambda q, k, v, span=span: plain_attention(q, k, v, span, scaling),
        )


SIZES = [1, 6, 11, 22, 37, 300]


@pytest.mark.parametrize("slots", [2, 3, 5, 72, 128])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])  # of values before tanh: tiny, ordinary, saturated
def test_address(slots, size, scale):
    length, heads = (130, 1) if size < 30 else (17, 3)
    query, keys = numbers(2, length, heads, size, scale=scale), numbers(2, length, slots, heads, size, scale=scale)
    assert_accurate(address, [query, keys], unit=0.1 if scale == 100.0 else 0.0)  # the slope of tanh, 1 - tanh^2


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("length", [1, 17, 63])
def test_geometry(slots, size, length):
    groups, field = integers(7, 2, length), numbers(2, length, slots, size, scale=3.0)
    anchors = numbers(7, slots, size)
    assert_accurate(lambda f, a: geometry(f, a, groups), [field, anchors])
    assert_accurate(lambda a: geometry(None, a, groups), [anchors])


@pytest.mark.parametrize("slots", [2, 3, 5])
@pytest.mark.parametrize(("size", "heads", "length"), [(1, 1, 17), (6, 3, 130), (11, 2, 63), (37, 4, 17), (300, 1, 1)])
def test_read(slots, size, heads, length):
    field = numbers(2, length, slots, size, scale=2.0)
    seen = torch.cat([field.sin(), field.cos()], dim=-1)
    weight, bias = numbers(2 * heads * size, 2 * size, scale=size**-0.5), numbers(2 * heads * size)
    assert_accurate(read_slots, [numbers(2, length, heads, size), seen, weight, bias])


@pytest.mark.parametrize("blocks", [16, 40])
def test_read_in_blocks_of_positions(blocks, monkeypatch):
    monkeypatch.setattr("pmnet.ops.phase._BLOCK", blocks * 3 * 2 * 11)
    test_read(3, 11, 2, 63)


@pytest.mark.parametrize(("depth", "width"), [(1, 37), (37, 1), (22, 11), (300, 37), (1100, 22)])
@pytest.mark.parametrize("count", [1, 3, 17, 130])
def test_linear(depth, width, count):
    inputs = [numbers(count, depth), numbers(width, depth, scale=depth**-0.5), numbers(width)]
    assert_accurate(row_stable_linear, inputs)
    assert_accurate(row_stable_linear, inputs[:2])


# The phasor update

WRITES = [
    (2, 63, 4, 3, 11),
    (2, 1, 1, 5, 37),
    (1, 17, 5, 2, 1),
    (3, 130, 16, 2, 22),
    (1, 17, 2, 3, 300),
]  # B, T, G, N, M


@pytest.mark.parametrize("bits", [4, 7, 32])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("cumulative", [True, False])
@pytest.mark.parametrize("shape", WRITES)
def test_states_are_those_of_the_scan(shape, ragged, cumulative, bits):
    weights, raw, groups, memory, documents, valid = write_problem(*shape, ragged)
    real = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    with use_backend("native"):
        angle, after = phase_write(weights, raw, groups, memory, documents, valid, bits, cumulative)
    delta = to_turns((weights.unsqueeze(-1) * native_theta(raw).unsqueeze(2)).flatten(2), bits)
    states, final = phase_scan(delta, groups, memory.flatten(2), documents, valid)
    if not cumulative:
        states, final = delta, memory.flatten(2)
    assert torch.equal(after.flatten(2), final)
    assert torch.equal(angle.flatten(2)[real], to_radians(states)[real])


@pytest.mark.parametrize("bits", [4, 7, 32])
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize(("cumulative", "scale_gradient"), [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize("shape", WRITES)
def test_gradient_of_a_write(shape, ragged, cumulative, scale_gradient, bits):
    """Backward does not depend on rounding, so it has a float64 truth whatever the bits."""
    weights, raw, groups, memory, documents, valid = write_problem(*shape, ragged)
    real = torch.ones_like(groups, dtype=torch.bool) if valid is None else valid
    upstream = numbers(*weights.shape, raw.shape[-1], seed=9) * real[..., None, None]

    def gradients(backend, dtype):
        inputs = [x.to(dtype).requires_grad_() for x in (weights, raw)]
        with use_backend(backend):
            angle, _ = phase_write(*inputs, groups, memory, documents, valid, bits, cumulative, scale_gradient)
            return [g[real] for g in torch.autograd.grad(angle, inputs, upstream.to(dtype))]

    results = (
        gradients(*how) for how in (("native", torch.float32), ("torch", torch.float32), ("torch", torch.float64))
    )
    assert_within_budget(results)


def test_padding_gets_no_gradient_from_others_and_gives_none():
    weights, raw, groups, memory, documents, valid = write_problem(2, 63, 4, 3, 11, ragged=True)
    found = []
    for filler in (1.0, math.nan):
        inputs = weights.clone().requires_grad_(), raw.clone().requires_grad_()
        with use_backend("native"):
            angle, _ = phase_write(*inputs, groups, memory, documents, valid)
        upstream = torch.ones_like(angle).masked_fill(~valid[..., None, None], filler)
        found.append([g[valid] for g in torch.autograd.grad(angle, inputs, upstream)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
