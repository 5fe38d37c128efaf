"""Random inputs and plain formulas for the tests of native operators."""

import math
from contextlib import contextmanager

import torch

from pmnet.ops import RMSNorm, phase_write, use_backend

EPS = torch.finfo(torch.float32).eps


def numbers(*shape, scale=1.0, seed=0):
    return scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def integers(top, *shape, seed=0):
    return torch.randint(0, top, shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


@contextmanager
def threads(count):
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def norm_of(weight, eps=1e-2):
    norm = RMSNorm(weight.shape[0], eps=eps, dtype=weight.dtype)
    del norm.weight
    norm.weight = weight
    return norm


def plain_attention(query, keys, values, span, scaling):
    """Attention with a matrix of who sees whom, in any precision."""
    batch, length, heads = query.shape[:3]
    group, past = heads // keys.shape[2], keys.shape[1] - length
    keys, values = keys.repeat_interleave(group, 2), values.repeat_interleave(group, 2)
    scores = torch.einsum("bthe,bjhe->bhtj", query, keys) * scaling
    count = torch.arange(length + past, device=query.device)
    back = count[:length].unsqueeze(1) + past - count
    seen = (back >= 0) & (back < span.expand(batch, -1).unsqueeze(-1))
    weights = scores.masked_fill(~seen.unsqueeze(1), -math.inf).softmax(-1)
    return torch.einsum("bhtj,bjhe->bthe", weights, values)


def write_problem(batch, length, groups, slots, size, ragged):
    """Inputs of a write; if ragged, with several documents (of even number) and padding."""
    weights = numbers(batch, length, slots).softmax(-1)
    raw, visited = numbers(batch, length, size), integers(groups, batch, length)
    memory = (integers(2**32, batch, groups, slots, size) - 2**31).int()
    documents = valid = None
    if ragged:
        documents = 2 * (integers(10, batch, length, seed=1) == 0).long().cumsum(1)
        valid = integers(5, batch, length, seed=2) > 0
        valid |= torch.diff(documents, prepend=documents[:, :1], dim=1) > 0  # padding starts no document
    return weights, raw, visited, memory, documents, valid


def native_theta(raw):
    """Angles `pi * tanh(raw)` of the native kernel: the derivative of `p * theta` with respect to p, one phase each."""
    single = raw.reshape(1, -1, 1)
    ones, groups = torch.ones_like(single, requires_grad=True), torch.zeros(single.shape[:2], dtype=torch.int64)
    memory = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    with use_backend("native"):
        angle, _ = phase_write(ones, single, groups, memory, cumulative=False, scale_gradient=False)
    return torch.autograd.grad(angle.sum(), ones)[0].view_as(raw)
