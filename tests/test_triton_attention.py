"""The Triton window attention against the formula: within twice the error of plain torch, in its own dtype."""

import pytest
import torch

from pmnet.ops.triton.attention import attention_backward, attention_forward
from tests.native_problems import integers, numbers, plain_attention
from tests.test_triton import DEVICE, HALF, assert_within_budget

SHAPES = [  # B, T, H, K, E, W
    (2, 63, 4, 2, 6, 9),
    (1, 1, 2, 2, 16, 128),
    (2, 70, 2, 1, 11, 40),
    (1, 130, 2, 2, 64, 128),
]


def problem(batch, length, heads, kv_heads, width, window, rows, dtype, draw=0):
    query = numbers(batch, length, heads, width, scale=2.0, seed=4 * draw)
    keys, values = (numbers(batch, window - 1 + length, kv_heads, width, seed=4 * draw + i) for i in (1, 2))
    upstream, span = numbers(batch, length, heads, width, seed=4 * draw + 3), 1 + integers(window, rows, length)
    return [x.to(dtype).to(DEVICE) for x in (query, keys, values, upstream)], span.to(DEVICE)


def plain(query, keys, values, upstream, span, scaling):
    inputs = [x.clone().requires_grad_() for x in (query, keys, values)]
    out = plain_attention(*inputs, span, scaling)
    return out.detach(), *torch.autograd.grad(out, inputs, upstream)


def run(query, keys, values, upstream, span, scaling):
    out, softmax = attention_forward(query, keys, values, span, scaling)
    return out, *attention_backward(upstream, query, keys, values, span, out, softmax, scaling)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(shape, dtype):
    scaling = shape[4] ** -0.5
    for rows in {1, shape[0]}:
        found = []
        for draw in range(-(-16 // (shape[0] * shape[1]))):  # the error of few positions is a matter of luck
            tensors, span = problem(*shape, rows, dtype, draw)
            got = run(*tensors, span, scaling)
            assert all(x.dtype == dtype for x in got)
            truth = plain(*(x.double() for x in tensors), span, scaling)
            found.append((got, plain(*tensors, span, scaling), truth))
        kinds = ([torch.stack(each) for each in zip(*kind, strict=True)] for kind in zip(*found, strict=True))
        assert_within_budget(("result", "query", "keys", "values"), *kinds)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_window_of_one_has_nothing_to_choose(dtype):
    (query, keys, values, upstream), span = problem(1, 17, 3, 3, 8, 1, 1, dtype)
    out, *gradients = run(query, keys, values, upstream, span, 0.5)
    assert torch.equal(out, values)
    assert torch.equal(gradients[2], upstream)
    slopes = 8 * (upstream * values).abs().amax(3, keepdim=True)  # of the only weight, before its mean is taken off
    bound = 0.5 * torch.finfo(torch.float32).eps * slopes.float()
    for gradient, other in zip(gradients[:2], (keys, query), strict=True):
        assert (gradient.float().abs() <= bound * other.float().abs() + 1e-9).all()


def test_what_is_not_seen_does_not_matter():
    tensors, _ = problem(1, 40, 2, 2, 8, 9, 1, torch.float32)
    span = torch.ones(1, 40, dtype=torch.int64, device=DEVICE)
    clean = run(*tensors, span, 0.3)
    for tensor in tensors[1:3]:
        tensor[:, :8] = 1e4  # before the chunk: nobody looks there
    spoiled = run(*tensors, span, 0.3)
    for a, b in zip(clean, spoiled, strict=True):
        assert torch.equal(a[:, -40:], b[:, -40:])


def test_wrong_input_is_named():
    (query, keys, values, upstream), span = problem(1, 5, 2, 2, 8, 3, 1, torch.float32)
    with pytest.raises(ValueError, match="attention: query"):
        attention_forward(query, keys[:, :4], values[:, :4], span, 1.0)
    with pytest.raises(ValueError, match=r"attention: query is torch\.float32"):
        attention_forward(query, keys.half(), values, span, 1.0)
    with pytest.raises(ValueError, match="attention: upstream"):
        attention_backward(upstream[:, 1:], query, keys, values, span, query, span, 1.0)
