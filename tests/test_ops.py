"""The phase arithmetic against the complex-number oracle, and its gradient against finite differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmnet.ops import circular_difference, lookup, phase_scan, phase_write, to_radians, to_turns, use_backend
from pmnet.ops.reference import phase_scan_reference
from pmnet.ops.scan import scan_rotations

SHAPES = [(2, 0, 3, 5), (1, 1, 1, 4), (2, 63, 4, 3), (3, 50, 64, 2), (2, 17, 1, 6)]  # B, T, G, C


def problem(batch, length, groups, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    delta = (torch.rand(batch, length, channels, generator=generator, dtype=torch.float64) - 0.5) * 2 * math.pi
    segments = torch.randint(0, groups, (batch, length), generator=generator)
    state = (torch.rand(batch, groups, channels, generator=generator, dtype=torch.float64) - 0.5) * 6
    return delta, segments, state


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("ragged", [False, True])
def test_scan_against_oracle(shape, ragged):
    delta, segments, state = problem(*shape)
    documents = None
    if ragged:
        documents = (torch.rand(shape[:2], generator=torch.Generator().manual_seed(1)) < 0.2).long().cumsum(1)
    expected, expected_final = phase_scan_reference(delta, segments, state, documents)
    got, final = phase_scan(to_turns(delta), segments, to_turns(state), documents)
    assert got.dtype == final.dtype == torch.int32
    for ours, oracle in ((got, expected), (final, expected_final)):
        assert (circular_difference(to_radians(ours, torch.float64), oracle).abs() < 1e-6).all()


def test_all_positions_in_distinct_segments():
    delta, _, state = problem(2, 20, 20, 3)
    segments = torch.stack([torch.randperm(20, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    states, final = phase_scan(to_turns(delta), segments, to_turns(state))
    alone = to_turns(delta) + to_turns(state).gather(1, segments.unsqueeze(-1).expand(-1, -1, 3))
    assert torch.equal(states, alone)
    assert torch.equal(final.gather(1, segments.unsqueeze(-1).expand(-1, -1, 3)), alone)


def test_a_million_steps_do_not_drift():
    length, step = 1_000_000, 0.7310585786300049
    turns = to_turns(torch.full((1, length, 1), step, dtype=torch.float64))
    states, _ = phase_scan(turns, torch.zeros(1, length, dtype=torch.long), torch.zeros(1, 1, 1, dtype=torch.int32))
    quantised = to_radians(turns[0, 0], torch.float64).item()
    z, oracle = 1 + 0j, complex(math.cos(quantised), math.sin(quantised))
    for _ in range(length):
        z *= oracle
    z /= abs(z)
    angle = torch.tensor(math.atan2(z.imag, z.real), dtype=torch.float64)
    assert circular_difference(to_radians(states[0, -1, 0], torch.float64), angle).abs() < 1e-6


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 10**6), st.data())
def test_any_chunking_gives_the_same_bits(length, groups, seed, data):
    delta, segments, state = problem(2, length, groups, 3, seed)
    turns, start = to_turns(delta), to_turns(state)
    whole, final = phase_scan(turns, segments, start)
    cut = data.draw(st.integers(0, length))
    first, middle = phase_scan(turns[:, :cut], segments[:, :cut], start)
    second, end = phase_scan(turns[:, cut:], segments[:, cut:], middle)
    assert torch.equal(torch.cat([first, second], 1), whole)
    assert torch.equal(end, final)
    alone, alone_final = phase_scan(turns[1:], segments[1:], start[1:])
    assert torch.equal(alone, whole[1:])
    assert torch.equal(alone_final, final[1:])


def test_padding_writes_nothing():
    delta, segments, state = problem(1, 12, 3, 4)
    valid = torch.rand(1, 12, generator=torch.Generator().manual_seed(2)) < 0.6
    states, final = phase_scan(to_turns(delta), segments, to_turns(state), valid=valid)
    kept, kept_final = phase_scan(to_turns(delta)[valid][None], segments[valid][None], to_turns(state))
    assert torch.equal(states[valid], kept[0])
    assert torch.equal(final, kept_final)


@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_padding_begins_no_document(backend):
    """A padded position of a later document leaves the memory of the earlier one alone."""
    weights, raw, groups, memory = write_problem(1, 6, 3, 2, 4, torch.float32)
    documents, valid = torch.tensor([[0, 0, 0, 0, 1, 1]]), torch.tensor([[True] * 4 + [False] * 2])
    with use_backend(backend):
        _, after = phase_write(weights, raw, groups, memory, documents, valid)
        _, wanted = phase_write(weights[:, :4], raw[:, :4], groups[:, :4], memory)
    assert torch.equal(after, wanted)


@pytest.mark.parametrize("bits", [4, 7, 32])
def test_rounding_and_dead_zone(bits):
    step = 2 * math.pi / 2**bits
    angles = torch.tensor([0.49, -0.49, 0.51, 3.0, -2.4], dtype=torch.float64) * step
    expected = torch.tensor([0, 0, 1, 3, -2], dtype=torch.float64) * step
    assert torch.allclose(to_radians(to_turns(angles, bits), torch.float64), expected, atol=1e-9, rtol=0)
    assert to_turns(torch.tensor([math.nan, math.inf]), bits).tolist() == [0, 0]


def write_problem(batch, length, groups, slots, size, dtype=torch.float64):
    """Weights, raw values, groups and memory of a write."""
    random = torch.Generator().manual_seed(3)
    weights = torch.randn(batch, length, slots, generator=random, dtype=dtype).softmax(-1)
    raw = 0.6 * torch.randn(batch, length, size, generator=random, dtype=dtype)
    visited = torch.randint(0, groups, (batch, length), generator=random)
    memory = torch.randint(-(2**31), 2**31, (batch, groups, slots, size), generator=random).int()
    return weights, raw, visited, memory


@pytest.mark.parametrize("cumulative", [True, False])
def test_gradient_against_finite_differences(cumulative):
    weights, raw, groups, memory = write_problem(2, 9, 3, 2, 2)
    documents = torch.tensor([[0] * 9, [0] * 4 + [1] * 5])

    def loss(weights, raw):
        angle, _ = phase_write(weights, raw, groups, memory, documents, cumulative=cumulative, scale_gradient=False)
        return angle.sin() + 0.3 * angle.cos()

    inputs = weights.requires_grad_(), raw.requires_grad_()
    assert torch.autograd.gradcheck(loss, inputs, eps=1e-3, atol=1e-5)  # a step of 1e-3 rad is 680,000 units


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_factor_counts_real_positions_of_the_segment(dtype):
    weights, raw, groups, memory = write_problem(2, 15, 3, 2, 2, dtype)
    valid = torch.ones(2, 15, dtype=torch.bool)
    valid[1, 11:] = False
    gradients = []
    for scale in (False, True):
        inputs = weights.clone().requires_grad_(), raw.clone().requires_grad_()
        angle, _ = phase_write(*inputs, groups, memory, valid=valid, scale_gradient=scale)
        gradients.append(torch.autograd.grad((angle.sin() * valid[..., None, None]).sum(), inputs))
    for b, t in ((b, t) for b in range(2) for t in range(15) if valid[b, t]):
        count = ((groups[b] == groups[b, t]) & valid[b]).sum()
        for plain, scaled in zip(*gradients, strict=True):
            assert plain[b, t].abs().max() > 0
            assert torch.allclose(scaled[b, t], plain[b, t] / math.sqrt(count))


def test_rounded_gradient_is_straight_through():
    delta, segments, state = problem(1, 6, 2, 3)
    rotation = delta.requires_grad_()
    angle, _ = scan_rotations(rotation, segments, to_turns(state), None, None, 5, True, False)
    angle.sum().backward()
    later = torch.tensor([[(segments[0, t:] == segments[0, t]).sum() for t in range(6)]], dtype=torch.float64)
    assert torch.equal(rotation.grad, later.unsqueeze(-1).expand(-1, -1, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradient_of_a_write_ignores_rounding(dtype):
    """Rotations of at most 4 bits; the gradients are those of `later positions * p * pi * tanh(raw)`."""
    weights, raw, groups, memory = write_problem(1, 12, 2, 3, 5, dtype)
    inputs = weights.requires_grad_(), raw.requires_grad_()
    later = torch.tensor([[(groups[0, t:] == groups[0, t]).sum() for t in range(12)]], dtype=dtype)
    plain = (later[..., None, None] * weights.unsqueeze(-1) * math.pi * torch.tanh(raw).unsqueeze(-2)).sum()
    angle, _ = phase_write(*inputs, groups, memory, phase_bits=4, scale_gradient=False)
    rounded = torch.autograd.grad(angle.sum(), inputs)
    for got, expected in zip(rounded, torch.autograd.grad(plain, inputs), strict=True):
        assert torch.allclose(got, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(dynamic, dtype):
    def step(weights, raw, groups, memory):
        angle, after = phase_write(weights, raw, groups, memory, phase_bits=9)
        return angle.sin().sum(), after

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for length in (13, 29):
        *inputs, groups, memory = write_problem(2, length, 4, 3, 3, dtype)
        eager, traced = ([x.clone().requires_grad_() for x in inputs] for _ in range(2))
        expected, final = step(*eager, groups, memory)
        got, got_final = compiled(*traced, groups, memory)
        assert torch.equal(got, expected)
        assert torch.equal(got_final, final)
        expected.backward()
        got.backward()
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(eager, traced, strict=True))


def test_types_do_not_mix_up_memory():
    """Raw values of another precision than the weights, and narrow integers, give what the plain formula gives."""
    weights, raw, groups, memory = write_problem(2, 40, 3, 4, 32, torch.float32)
    documents = torch.tensor([[0] * 30 + [2] * 10, [1] * 40])
    for kind in (torch.bfloat16, torch.float64):
        expected = phase_write(weights, raw.to(kind).float(), groups, memory, documents)
        got = phase_write(weights, raw.to(kind), groups.int(), memory, documents.int())
        assert circular_difference(got[0], expected[0]).abs().max() < 1e-5
        assert (got[1] - expected[1]).abs().max() < 2**32 * 1e-6


def test_lookup_is_a_lookup():
    table = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([[0, 3, 3], [4, 0, 1]])
    assert torch.equal(lookup(table, index), table[index])
    assert torch.autograd.gradcheck(lambda t: lookup(t, index).sin(), table)


@pytest.mark.parametrize(
    ("delta", "segments", "state"),
    [
        (torch.zeros(1, 2, 3), torch.zeros(1, 2).long(), torch.zeros(1, 1, 3, dtype=torch.int32)),
        (torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 4).long(), torch.zeros(1, 1, 3, dtype=torch.int32)),
        (torch.zeros(1, 2, 3, dtype=torch.int32), torch.zeros(1, 2).long(), torch.zeros(1, 1, 4, dtype=torch.int32)),
    ],
)
def test_wrong_input_is_named(delta, segments, state):
    with pytest.raises(ValueError, match="phase_scan"):
        phase_scan(delta, segments, state)


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_a_group_or_a_grid_out_of_range_is_refused(backend):
    weights, raw, groups, memory = write_problem(2, 5, 3, 2, 4)
    with use_backend(backend):
        for bits in (0, 33):
            with pytest.raises(ValueError, match=f"phase_bits must be from 1 to 32, got {bits}"):
                phase_write(weights, raw, groups, memory, phase_bits=bits)
        for group in (-1, memory.shape[1]):
            with pytest.raises(ValueError, match=rf"groups must lie in \[0, {memory.shape[1]}\), got {group}"):
                phase_write(weights, raw, groups.index_fill(1, torch.tensor([2]), group), memory)


def test_angles_of_many_turns_are_angles():
    turns = torch.tensor([2.0**31 + 0.25, -(2.0**20) - 0.125, 2.0**40], dtype=torch.float64)
    for bits in (3, 5, 32):
        assert torch.equal(to_turns(turns * 2 * math.pi, bits), to_turns(turns.frac() * 2 * math.pi, bits))
    assert to_turns(torch.tensor([math.inf, math.nan])).tolist() == [0, 0]


def test_a_write_names_wrong_input():
    weights, raw, groups, memory = write_problem(2, 5, 3, 2, 4)
    for arguments in (
        (weights, raw[:, 1:], groups, memory),
        (weights, raw, groups[:1], memory),
        (weights, raw, groups, memory[:, :, 1:]),
        (weights, raw, groups, memory.long()),
    ):
        with pytest.raises(ValueError, match="phase_write"):
            phase_write(*arguments)
