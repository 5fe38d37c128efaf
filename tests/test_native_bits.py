"""Native operators: the same bits in any company, the ends of the number range, and how they are built."""

import math
import sys

import pytest
import torch

from pmnet.ops import (
    address,
    geometry,
    norm_rotate,
    phase_write,
    read_slots,
    rotary_table,
    row_stable_linear,
    silu_product,
    use_backend,
    window_attention,
)
from pmnet.ops.native import FLAGS, library, processor_flags
from tests.native_problems import EPS, integers, native_theta, norm_of, numbers, plain_attention, threads, write_problem

# The same bits in any company


def row_wise():
    """Every operator as a function of positions: name, function of a slice, number of positions."""
    length, random = 131, numbers
    positions = integers(10**6, 1, length)
    x, weight = random(2, length, 300), random(300)
    heads = random(2, length, 4, 22)
    query, keys, values = random(2, length, 4, 22), random(2, 8 + length, 2, 22), random(2, 8 + length, 2, 22, seed=1)
    span = 1 + integers(9, 2, length)
    q, k = random(2, length, 3, 37), random(2, length, 3, 3, 37)
    field, anchors, groups = random(2, length, 3, 37), random(7, 3, 37), integers(7, 2, length)
    seen = torch.cat([field.sin(), field.cos()], dim=-1)
    read_weight, read_bias = random(2 * 3 * 37, 2 * 37), random(2 * 3 * 37)
    # of most slots what they were a position before: kernels do not compute it again
    since = torch.where(integers(5, 2, length, 3) == 0, torch.arange(length).view(-1, 1), 0).cummax(1).values
    still, visited = field.gather(1, since.unsqueeze(3).expand_as(field)), groups.gather(1, since[:, :, 0])
    kept = torch.cat([still.sin(), still.cos()], dim=-1)

    def rotated(s):
        return norm_rotate(heads[:, s], norm_of(weight[:22]), *rotary_table(positions[:, s], 22, 1e4, heads))

    def attended(s):
        around = slice(s.start, s.stop + 8)
        return window_attention(query[:, s], keys[:, around], values[:, around], span[:, s], 0.2)

    return {
        "norm": lambda s: norm_of(weight)(x[:, s]),
        "rotation": rotated,
        "table": lambda s: torch.stack(rotary_table(positions[:, s], 300, 1e6, x), dim=2),
        "gate": lambda s: silu_product(x[:, s], 2 * x[:, s] + 1),
        "attention": attended,
        "address": lambda s: address(q[:, s], k[:, s]),
        "geometry": lambda s: geometry(field[:, s], anchors, groups[:, s]),
        "geometry of what stays": lambda s: geometry(still[:, s], anchors, visited[:, s]),
        "read": lambda s: read_slots(q[:, s], seen[:, s], read_weight, read_bias),
        "read of what stays": lambda s: read_slots(q[:, s], kept[:, s], read_weight, read_bias),
        "linear": lambda s: row_stable_linear(x[:, s], random(40, 300), random(40)),
    }


@pytest.mark.parametrize("name", list(row_wise()))
def test_a_position_has_the_same_bits_in_any_slice(name):
    function = row_wise()[name]
    with torch.no_grad(), use_backend("native"):
        with threads(1):
            whole = function(slice(0, 131))
        for count in (1, 2, 4):
            with threads(count):
                assert torch.equal(function(slice(0, 131)), whole)
                for start, stop in ((0, 1), (130, 131), (3, 20), (17, 81), (64, 131), (1, 131)):
                    assert torch.equal(function(slice(start, stop)), whole[:, start:stop]), (count, start, stop)


NARROWER = {b"avx512f": "x86-64-v3", b"avx2": "x86-64-v2"}  # what a processor can do, and one that cannot


@pytest.mark.parametrize("feature", list(NARROWER))
def test_narrower_registers_give_the_same_bits(feature, monkeypatch, tmp_path):
    """Kernels built for processors without AVX-512, and without AVX."""
    if feature not in processor_flags().split():
        pytest.skip("the registers are narrow here")

    def results():
        with torch.no_grad(), use_backend("native"):
            found = {name: function(slice(0, 131)) for name, function in row_wise().items()}
            for i, part in enumerate(phase_write(*write_problem(3, 130, 4, 3, 70, ragged=True))):
                found[f"write {i}"] = part
            return found

    wide = results()
    flags = [flag for flag in FLAGS if not flag.startswith(("-m", "-O"))]
    monkeypatch.setattr(sys.modules[library.__module__], "FLAGS", [*flags, "-O1", f"-march={NARROWER[feature]}"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    library.cache_clear()
    try:
        narrow = results()
    finally:
        library.cache_clear()
    assert len(list(tmp_path.rglob("*.so"))) == 1
    for name, expected in wide.items():
        assert torch.equal(narrow[name], expected), name


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_write_has_the_same_bits_in_any_cut_and_company(count):
    weights, raw, groups, memory, documents, valid = write_problem(3, 130, 4, 3, 70, ragged=True)
    inputs = weights, raw, groups
    with use_backend("native"):
        with threads(1):
            angle, after = phase_write(*inputs, memory)
        with threads(count):
            for cut in (1, 17, 64, 129):
                first, middle = phase_write(*(x[:, :cut] for x in inputs), memory)
                second, end = phase_write(*(x[:, cut:] for x in inputs), middle)
                assert torch.equal(torch.cat([first, second], 1), angle)
                assert torch.equal(end, after)
            whole = phase_write(*inputs, memory, documents, valid)
            for b in range(3):
                alone = phase_write(*(x[b : b + 1] for x in (*inputs, memory, documents, valid)))
                assert torch.equal(alone[0][0][valid[b]], whole[0][b][valid[b]])
                assert torch.equal(alone[1][0], whole[1][b])


@pytest.mark.parametrize("name", ["norm", "rotation", "gate", "attention", "address", "geometry", "read"])
def test_gradients_do_not_depend_on_the_number_of_threads(name):
    """Those of the inputs of positions."""
    x, y, z = (numbers(2, 131, 44, seed=i).requires_grad_() for i in range(3))
    weight, keys, ones = numbers(22), (numbers(88, 88), numbers(88)), torch.ones(2, 131, dtype=torch.int64)
    table = rotary_table(torch.arange(131)[None], 22, 1e4, x)
    heads, slots = [v.unflatten(2, (2, 22)) for v in (x, y, z)], torch.stack([y, z], 2)
    function, used = {
        "norm": (lambda: norm_of(keys[1][:44])(x), [x]),
        "rotation": (lambda: norm_rotate(heads[0], norm_of(weight), *table), [x]),
        "gate": (lambda: silu_product(x, y), [x, y]),
        "attention": (lambda: window_attention(heads[0][:, 8:], *heads[1:], 9 * ones[:, 8:], 0.2), [x, y, z]),
        "address": (lambda: address(x.unsqueeze(2), slots.unsqueeze(3)), [x, y, z]),
        "geometry": (lambda: geometry(heads[0], numbers(7, 2, 22), ones), [x]),
        "read": (lambda: read_slots(x.unsqueeze(2), slots.repeat(1, 1, 1, 2), *keys), [x, y, z]),
    }[name]
    found = []
    with use_backend("native"):
        for count in (1, 2, 4):
            with threads(count):
                found.append(torch.autograd.grad(function().sin().sum(), used, retain_graph=True))
    for gradients in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients, found[0], strict=True))


# The ends of the number range

EXTREMES = torch.tensor([0.0, 1e-30, -1e-30, 1e-7, 0.3, -1.0, 8.9, 20.0, -100.0, 1e4, -1e4])


def test_angles_are_accurate_relative_to_themselves():
    raw = torch.cat([EXTREMES, -EXTREMES, torch.logspace(-38, 4, 1000), numbers(1000)])
    exact = math.pi * torch.tanh(raw.double())
    assert ((native_theta(raw) - exact).abs() <= 4 * EPS * exact.abs()).all()


def test_small_rotations_are_rounded_not_lost():
    """`pi * 1e-6` is 2147.48 units; with 7 bits half a step is the limit."""
    raw = torch.tensor([1e-6, 3e-9, 1e-11, 1e-30, 0.0, -1e-6])
    memory = torch.zeros(1, 1, 1, 6, dtype=torch.int32)
    write = torch.ones(1, 1, 1), raw.view(1, 1, 6), torch.zeros(1, 1, dtype=torch.int64), memory
    with use_backend("native"):
        assert phase_write(*write)[1].flatten().tolist() == [2147, 6, 0, 0, 0, -2147]
        for theta, step in ((0.49, 0), (-0.49, 0), (0.51, 1), (-0.51, -1)):
            turned = torch.full((1, 1, 6), math.atanh(theta * 2 / 128))
            after = phase_write(write[0], turned, write[2], memory, phase_bits=7)[1]
            assert (after == step * 2**25).all()


def test_sine_and_cosine_up_to_fifty_radians():
    angles = torch.cat([torch.linspace(-50, 50, 4001), EXTREMES[:6], math.pi / 2 * torch.arange(-31, 32)])
    with use_backend("native"):
        got = geometry(None, angles.view(1, 1, -1), torch.zeros(1, 1, dtype=torch.int64)).flatten()
    sine, cosine = got.chunk(2)
    assert (sine - angles.double().sin()).abs().max() < 2 * EPS
    assert (cosine - angles.double().cos()).abs().max() < 2 * EPS
    small = angles.abs() < 1e-3
    assert ((sine - angles.double().sin()).abs() <= 2 * EPS * angles.abs())[small].all()


def test_extreme_values_give_numbers():
    """Saturated, zero and denormal values: finite weights that sum to one, finite gradients, and the float64 result."""
    count = len(EXTREMES)
    query = EXTREMES.view(1, count, 1, 1).repeat(1, 1, 1, 5).requires_grad_()
    keys = EXTREMES.flip(0).view(1, 1, count, 1, 1).repeat(1, count, 1, 1, 5).requires_grad_()
    gate = EXTREMES.view(1, 1, -1).clone().requires_grad_()
    scores = (3e3 * numbers(1, 12, 1, 4)).requires_grad_()
    span = torch.arange(1, 13)[None].clamp(max=4)
    with use_backend("native"):
        weights, gated = address(query, keys), silu_product(gate, torch.ones_like(gate))
        before = torch.cat([scores[:, :3], scores], dim=1)
        mixed = window_attention(scores, before, before, span, 1.0)
    assert torch.allclose(weights.sum(2), torch.ones(1, count, 1))
    with use_backend("torch"):
        assert torch.allclose(weights.double(), address(query.double(), keys.double()), rtol=1e-5, atol=0)
    exact = gate.detach().double() * torch.sigmoid(gate.detach().double())
    assert torch.allclose(gated.double(), exact, rtol=4 * EPS, atol=1e-30)
    assert torch.allclose(mixed, plain_attention(scores, before, before, span, 1.0), rtol=1e-4)
    gradients = torch.autograd.grad(weights.square().sum() + gated.sum() + mixed.sum(), (query, keys, gate, scores))
    assert all(g.isfinite().all() for g in (weights, gated, mixed, *gradients))


@pytest.mark.parametrize("name", sorted(name for name in row_wise() if name != "table" and "stays" not in name))
def test_undefined_numbers_stay_in_their_row_and_are_seen(name):
    """NaN in one sequence: no bit of the other changes, and none of its results looks like a number."""
    clean, spoiled = (numbers(2, 20, 44) for _ in range(2))
    spoiled[0] = math.nan
    groups, span = torch.zeros(2, 20, dtype=torch.int64), torch.full((2, 12), 9)
    table = rotary_table(torch.arange(20)[None], 22, 1e4, clean)
    functions = {
        "norm": lambda x: norm_of(torch.ones(44))(x),
        "rotation": lambda x: norm_rotate(x.unflatten(2, (2, 22)), norm_of(torch.ones(22)), *table),
        "gate": lambda x: silu_product(x, torch.ones_like(x)),
        "attention": lambda x: window_attention(*(y.unflatten(2, (2, 22)) for y in (x[:, 8:], x, x)), span, 0.2),
        "address": lambda x: address(x.unsqueeze(2), torch.stack([x + 1, x - 1], 2).unsqueeze(3)),
        "geometry": lambda x: geometry(x.unflatten(2, (2, 22)), numbers(1, 2, 22), groups),
        "read": lambda x: read_slots(
            x.unsqueeze(2), torch.stack([x, -x], 2).repeat(1, 1, 1, 2), numbers(88, 88), x[1, 0].repeat(2)
        ),
        "linear": lambda x: row_stable_linear(x, numbers(5, 44)),
    }
    with use_backend("native"):
        expected, got = functions[name](clean), functions[name](spoiled)
    assert torch.equal(got[1], expected[1])
    assert expected.isfinite().all()
    assert got[0].isnan().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("backend", ["torch", "native"])
def test_undefined_rotations_are_zero(backend, bad):
    weights, raw, groups, memory, *_ = write_problem(2, 30, 3, 2, 40, ragged=False)
    spoiled_weights, spoiled_raw = weights.clone(), raw.clone()
    spoiled_weights[0, 3, 1] = bad
    spoiled_raw[1, 4, 35] = math.nan
    expected_weights, expected_raw = weights.clone(), raw.clone()
    expected_weights[0, 3, 1], expected_raw[1, 4, 35] = 0.0, 0.0
    with use_backend(backend):
        got = phase_write(spoiled_weights, spoiled_raw, groups, memory)
        expected = phase_write(expected_weights, expected_raw, groups, memory)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))
