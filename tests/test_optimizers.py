"""Muon in float32: the update of its definition, to rounding, and no gradient changed."""

import pytest
import torch

from pmnet.train.optimizers import Muon


def direction(gradient):
    """What Muon makes of a matrix: five Newton-Schulz steps towards the nearest orthogonal one (its published form)."""
    x = gradient.double() / gradient.double().norm()
    for _ in range(5):
        gram = x @ x.T
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x


@pytest.mark.parametrize("shape", [(24, 24), (64, 22), (5, 48)])
def test_muon_rounds_to_float32_only(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    before = weight.detach().double()
    gradients = [torch.randn(shape, generator=generator) for _ in range(2)]
    optimizer = Muon([weight], lr=0.01, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    moment = torch.zeros(shape, dtype=torch.float64)
    for gradient in gradients:
        weight.grad = gradient.clone()
        optimizer.step()
        assert torch.equal(weight.grad, gradient)
        moment = moment.lerp(gradient.double(), 0.05)
        step = direction(gradient.double().lerp(moment, 0.95))
        before = before * (1 - 0.01 * 0.1) - 0.01 * 0.2 * max(shape) ** 0.5 * step
    moved = 0.01 * 0.2 * max(shape) ** 0.5
    bound = 1e-5 * moved + 4e-7 * before.abs().max()  # bfloat16 is a hundred times as far
    assert (weight.detach() - before).abs().max() <= bound
    assert weight.detach().bfloat16().dtype == torch.bfloat16  # as ever outside a step
