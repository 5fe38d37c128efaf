"""Fused kernels against the plain formulas: states bit for bit, the rest within twice the error of plain torch.

An error is the root mean square of the difference from a float64 evaluation. The budget of a kernel is twice what the
same formula in torch loses in the kernel's own dtype, plus one rounding. Without a GPU the kernels run in triton's
interpreter (see `tests/__init__.py`), which cannot multiply bfloat16 matrices.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from pmnet.ops import phase_scan, to_radians, to_turns
from pmnet.ops.scan import plan_segments
from pmnet.ops.triton.read import read_forward
from pmnet.ops.triton.read_gradient import read_backward
from pmnet.ops.triton.scan import write_states
from pmnet.ops.triton.scan_gradient import write_gradient

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALF = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]
if DEVICE.type == "cuda":  # the first product in a thread of autograd warns that the thread has no context yet
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.ones(2, 2, device=DEVICE, requires_grad=True).mm(torch.ones(2, 2, device=DEVICE)).sum().backward()
WRITES = [(2, 63, 4, 3, 11), (2, 1, 1, 4, 16), (1, 17, 5, 2, 40)]  # B, T, G, N, M
LONG = [((1, 300, groups, 2, 5), groups == 3) for groups in (1, 3, 150)]  # more than two programs' places
READS = [(2, 63, 3, 11, 3), (1, 1, 4, 16, 2), (1, 17, 4, 40, 4), (1, 9, 2, 150, 1)]  # B, T, N, M, R


def write_problem(batch, length, groups, slots, size, ragged, seed=0):
    """Inputs of a write; if ragged, with several documents and padding at both ends and in between."""
    random = torch.Generator().manual_seed(seed)
    weights = torch.randn(batch, length, slots, generator=random).softmax(-1)
    rotation = (torch.rand(batch, length, size, generator=random) - 0.5) * 2 * math.pi
    segments = torch.randint(0, groups, (batch, length), generator=random)
    state = torch.randint(-(2**31), 2**31, (batch, groups, slots * size), generator=random).int()
    documents = valid = None
    if ragged:
        documents = (torch.rand(batch, length, generator=random) < 0.1).long().cumsum(1)
        documents[0] = (torch.arange(length) >= 0.7 * length) * 3  # skips documents 1 and 2
        valid = torch.rand(batch, length, generator=random) < 0.8
        valid[:, length // 3] = True
    moved = (x if x is None else x.to(DEVICE) for x in (weights, rotation, segments, state, documents, valid))
    return tuple(moved)


def run_write(weights, rotation, segments, state, documents, valid, bits):
    plan = plan_segments(segments, state.shape[1], documents, valid)
    return write_states(weights, rotation, plan.order, plan.start, segments, state, documents, valid, bits)


def plain_write(weights, rotation, segments, state, documents, valid, bits):
    product = (weights.unsqueeze(-1) * rotation.unsqueeze(-2)).flatten(2)
    return phase_scan(to_turns(product, bits), segments, state, documents, valid)


def assert_same_states(problem, bits):
    valid = torch.ones_like(problem[2], dtype=torch.bool) if problem[5] is None else problem[5]
    got, final = run_write(*problem, bits)
    expected, expected_final = plain_write(*problem, bits)
    assert (got.dtype, final.dtype) == (torch.float32, torch.int32)
    assert torch.equal(got[valid], to_radians(expected[valid]))
    assert torch.equal(final, expected_final)


def assert_equal_writes(one, other):
    for a, b in zip(run_write(*one, 32), run_write(*other, 32), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("shape", WRITES)
def test_states(shape, ragged):
    assert_same_states(write_problem(*shape, ragged), bits=32)


@pytest.mark.parametrize("bits", [1, 4, 7])
def test_states_of_few_bits(bits):
    assert_same_states(write_problem(1, 37, 3, 3, 5, ragged=True), bits)


def test_states_of_positions_that_share_no_segment():
    weights, rotation, segments, state, *_ = write_problem(1, 20, 20, 3, 5, ragged=False)
    segments[0] = torch.randperm(20, generator=torch.Generator().manual_seed(1))
    assert_same_states((weights, rotation, segments, state, None, None), bits=32)


def test_states_of_large_and_undefined_angles():
    """Up to 2**49 steps (the model's have at most 2**31); NaN, infinity and what is beyond rotate nothing."""
    weights, rotation, segments, state, *_ = write_problem(1, 33, 2, 4, 8, ragged=False)
    rotation = rotation * torch.logspace(0, 5.5, 8, device=DEVICE)
    rotation[0, 3, 2], rotation[0, 5, 1], rotation[0, 6, 0] = math.nan, math.inf, -math.inf
    assert_same_states((weights, rotation, segments, state, None, None), bits=32)
    beyond, still = torch.full_like(rotation, 2.0**40), torch.zeros_like(rotation)
    assert_equal_writes((weights, beyond, segments, state, None, None), (weights, still, segments, state, None, None))


def test_states_across_chunks():
    """A program has 128 places: segments that begin, end and go on between them, for one group and for many."""
    for groups in (1, 3, 150):
        for ragged in (False, True):
            assert_same_states(write_problem(1, 300, groups, 2, 5, ragged), bits=32)


def test_states_without_positions():
    weights, rotation, segments, state, *_ = write_problem(2, 0, 3, 2, 4, ragged=False)
    states, final = run_write(weights, rotation, segments, state, segments, None, 32)
    assert states.shape == (2, 0, 8)
    assert torch.equal(final, state)


def test_states_do_not_depend_on_memory_layout():
    weights, rotation, segments, state, *_ = write_problem(2, 9, 3, 3, 5, ragged=False)
    strided = (x.mT.contiguous().mT for x in (weights, rotation))
    segments = segments[:1].expand(2, 9)
    assert_same_states((*strided, segments, state.mT.contiguous().mT, None, None), bits=32)


def plain_angles(weights, rotation, segments, documents, valid, scale_gradient):
    """Angles as a product with the matrix of "same segment and not later": differentiable, any float dtype."""
    delta = (weights.unsqueeze(-1) * rotation.unsqueeze(-2)).flatten(2)
    same = segments.unsqueeze(2) == segments.unsqueeze(1)
    if documents is not None:
        same = same & (documents.unsqueeze(2) == documents.unsqueeze(1))
        same = same & valid.unsqueeze(2) & valid.unsqueeze(1)
    same = same.to(delta.dtype)
    if scale_gradient:
        factor = same.sum(2, keepdim=True).clamp(min=1).rsqrt()
        delta = delta.detach() + factor * (delta - delta.detach())
    return torch.tril(same) @ delta


def assert_within_budget(names, got, plain, oracle):
    for name, a, b, exact in zip(names, got, plain, oracle, strict=True):
        assert a.shape == exact.shape
        error, allowed, size = (x.square().mean().sqrt().item() for x in (a - exact, b - exact, exact))
        rounding = torch.finfo(a.dtype).eps * size
        assert error <= 2 * allowed + rounding, f"{name}: {error} > 2 * {allowed} + {rounding}"


@pytest.mark.parametrize(("shape", "ragged"), [(WRITES[0], False), (WRITES[0], True), (WRITES[2], True), *LONG])
@pytest.mark.parametrize("scale_gradient", [True, False])
def test_write_gradient(shape, ragged, scale_gradient):
    weights, rotation, segments, _, documents, valid = write_problem(*shape, ragged)
    upstream = torch.randn(*shape[:2], shape[3] * shape[4], generator=torch.Generator().manual_seed(2)).to(DEVICE)
    real = torch.ones_like(segments, dtype=torch.bool) if valid is None else valid

    def plain(dtype):
        w, r = (x.to(dtype).requires_grad_() for x in (weights, rotation))
        angles = plain_angles(w, r, segments, documents, valid, scale_gradient)
        return [g[real] for g in torch.autograd.grad(angles, (w, r), upstream.to(dtype) * real.unsqueeze(-1))]

    plan = plan_segments(segments, shape[2], documents, valid)
    got = write_gradient(upstream, weights, rotation, plan.order, plan.start, plan.end, scale_gradient)
    assert all(g.isfinite().all() for g in got)
    assert_within_budget(("p", "theta"), [g[real] for g in got], plain(torch.float32), plain(torch.float64))


def test_write_gradient_of_padding_stays_there():
    weights, rotation, segments, _, documents, valid = write_problem(1, 40, 4, 3, 5, ragged=True)
    plan = plan_segments(segments, 4, documents, valid)
    inputs = weights, rotation, plan.order, plan.start, plan.end
    upstream = torch.ones(1, 40, 15, device=DEVICE)
    clean = write_gradient(upstream, *inputs, scale_gradient=True)
    upstream[~valid] = math.nan
    spoiled = write_gradient(upstream, *inputs, scale_gradient=True)
    for a, b in zip(clean, spoiled, strict=True):
        assert torch.equal(a[valid], b[valid])


def read_problem(batch, length, slots, size, heads, scale, dtype, seed=3):
    """Inputs of a read and its upstream gradient; queries before tanh are about as large as `scale`, keys at most 4."""
    random = torch.Generator().manual_seed(seed)
    field = 2 * torch.randn(batch, length, slots, size, generator=random)
    query = scale * torch.randn(batch, length, heads, size, generator=random)
    geometry = torch.cat([field.sin(), field.cos()], dim=-1)
    weight = min(scale, 4.0) * torch.randn(heads * size, 2 * size, generator=random) / math.sqrt(size)
    bias = min(scale, 4.0) * torch.randn(heads * size, generator=random)
    upstream = torch.randn(batch, length, heads, 2 * size, generator=random)
    return [x.to(dtype).to(DEVICE) for x in (query, geometry, weight, bias, upstream)]


def plain_read(query, geometry, weight, bias, upstream):
    """Mixed geometry, attention, and the four gradients, in the dtype of the inputs."""
    inputs = [x.clone().requires_grad_() for x in (query, geometry, weight, bias)]
    q, geo, w, b = inputs
    wide = torch.promote_types(geo.dtype, torch.float32)  # angles are never in half precision
    keys = math.pi * torch.tanh(F.linear(geo, w, b).to(wide)).view(*geo.shape[:3], *q.shape[2:])
    agreement = torch.cos(math.pi * torch.tanh(q.to(wide)).unsqueeze(2) - keys).sum(-1)
    attention = torch.softmax(agreement / math.sqrt(q.shape[-1]), dim=2)
    mixed = torch.einsum("btnr,btnk->btrk", attention.to(geo.dtype), geo)
    return mixed.detach(), attention.detach(), *torch.autograd.grad(mixed, inputs, upstream)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])  # of angles before tanh: tiny, ordinary, saturated
@pytest.mark.parametrize("shape", READS)
def test_read(shape, scale, dtype):
    found = []
    for seed in range(-(-16 // (shape[0] * shape[1]))):  # the error of few positions is a matter of luck
        *inputs, upstream = read_problem(*shape, scale, dtype, seed)
        mixed, attention = read_forward(*inputs)
        assert mixed.dtype == dtype
        assert attention.dtype == torch.float32
        gradients = read_backward(upstream, *inputs, attention, chunk=50)
        assert all(g.dtype == dtype for g in gradients)
        truth = plain_read(*(x.double() for x in (*inputs, upstream)))
        found.append(((mixed, attention, *gradients), plain_read(*inputs, upstream), truth))
    names = ("mixed", "attention", "query", "geometry", "key weight", "key bias")
    assert_within_budget(
        names, *([torch.stack(each) for each in zip(*kind, strict=True)] for kind in zip(*found, strict=True))
    )


def test_read_of_a_position_does_not_depend_on_the_others():
    *inputs, weight, bias, upstream = read_problem(*READS[0], 1.0, torch.float32)
    *others, _, _, other_upstream = read_problem(*READS[0], 3.0, torch.float32, seed=4)
    for mine, other in zip((*inputs, upstream), (*others, other_upstream), strict=True):
        other[1, 5:] = mine[1, 5:]
    whole, beside_others = (read_forward(*pair, weight, bias) for pair in (inputs, others))
    for a, b in zip(whole, beside_others, strict=True):
        assert torch.equal(a[1, 5:], b[1, 5:])
        assert not torch.equal(a[1, :5], b[1, :5])
    gradients = read_backward(upstream, *inputs, weight, bias, whole[1])
    again = read_backward(other_upstream, *others, weight, bias, beside_others[1])
    assert torch.equal(gradients[0][1, 5:], again[0][1, 5:])
    if DEVICE.type == "cuda":  # in the interpreter, products are NumPy's, whose bits depend on where a row stands
        sliced = read_forward(*(x[1:, 5:] for x in inputs), weight, bias)
        assert all(torch.equal(a[1:, 5:], b) for a, b in zip(whole, sliced, strict=True))
        part = read_backward(upstream[1:, 5:], *(x[1:, 5:] for x in inputs), weight, bias, sliced[1])
        assert torch.equal(gradients[0][1:, 5:], part[0])


def test_wrong_input_is_named():
    weights, rotation, segments, state, *_ = write_problem(1, 3, 2, 2, 4, ragged=False)
    with pytest.raises(ValueError, match="write: weights must be"):
        run_write(weights.double(), rotation, segments, state, None, None, 32)
    with pytest.raises(ValueError, match="write: initial_state must be"):
        run_write(weights, rotation, segments, state[:, :, 1:], None, None, 32)
    query, geometry, weight, bias, _ = read_problem(1, 3, 2, 4, 2, 1.0, torch.float32)
    with pytest.raises(ValueError, match="read: query"):
        read_forward(query[..., 1:], geometry, weight, bias)
    with pytest.raises(ValueError, match="read: upstream must be"):
        read_backward(query, query, geometry, weight, bias, query)
    with pytest.raises(ValueError, match=r"read: geometry is torch\.float32"):
        read_forward(query, geometry, weight.half(), bias)


MOST_SHARED = {90: 227 * 1024, 86: 99 * 1024}  # bytes that one program can have, by compute capability


def test_every_launch_compiles_for_a_gpu(tmp_path):
    """The compiler needs no GPU. What the kernels rely on must be in the machine code."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    program = [sys.executable, "-W", "error", "-m", "tests.triton_ptx"]
    root = Path(__file__).parent.parent
    out = subprocess.run(program, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert out.returncode == 0, out.stderr
    built = json.loads(out.stdout)
    assert len({launch["kernel"] for launch in built}) == 10
    for launch in built:
        assert launch["shared"] <= MOST_SHARED[launch["target"]]
        if launch["kernel"] in (
            "_write_states_kernel",
            "_sum_states_kernel",
        ):  # every product is rounded before it is added to
            assert "mul.rn.f64" in launch["ptx"]
            assert "fma" not in launch["ptx"]
    first = {launch["kernel"]: launch["ptx"] for launch in reversed(built)}  # bfloat16
    for kernel in ("_read_forward_kernel", "_read_backward_kernel", "_forward_kernel", "_key_gradient_kernel"):
        assert "wgmma.mma_async" in first[kernel]  # half precision on tensor cores
