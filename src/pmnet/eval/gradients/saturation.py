"""How full a memory of angles gets: spread of its states, what random codes can be told apart in it, and rounding.

Shapes: B sequences, K writes of one slot, M phases of it, V codes to choose from.
"""

import math
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from pmnet.data.tasks import Filler
from pmnet.model import PMNetCache, PMNetForCausalLM
from pmnet.ops import to_radians, to_turns
from pmnet.train.loop import loss_of

CODES = 256
BITS = (4, 5, 6, 7, 8, 10, 12, 16, 24, 32)
SCALES = (0.05, 0.2, 0.5, 1.0)  # standard deviation of a code, in radians
WRITES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


@torch.no_grad()
def spread(model: PMNetForCausalLM, longest: int, rows: int, seed: int, kind: str = "random") -> list[dict[str, Any]]:
    """Circular variance of the states by the number of bytes read, `1 - |mean exp(i phi)|`, by level.

    The mean is over B sequences, its square freed of the bias of a finite B, and averaged over the phases of a level.
    0: all sequences agree. 1: as if every angle were drawn uniformly.

    Args:
        model: in eval mode.
        longest: bytes.
        rows: B, at least 2.
        seed: of the bytes.
        kind: of filler that is read.

    Raises:
        ValueError: if `check_fills` does.
    """
    check_fills(model)
    filling = Filler(kind).draw(rows, longest, torch.Generator().manual_seed(seed))
    cache, found, done = PMNetCache(model.config, rows), [], 0
    for power in range(longest.bit_length()):
        for start in range(done, 2**power, 512):
            model(filling.columns(start, min(start + 512, 2**power))[0], past_key_values=cache, logits_to_keep=1)
        done = 2**power
        levels = []
        for memory in cache.memory:
            angle = to_radians(memory, torch.float64)
            square = angle.cos().mean(0).square() + angle.sin().mean(0).square()
            unbiased = ((rows * square - 1) / (rows - 1)).mean().clamp(min=0)
            levels.append(1 - float(unbiased.sqrt()))
        found.append({"bytes": done, "levels": levels})
    return found


def check_fills(model: PreTrainedModel) -> None:
    """ValueError if it is no PMNet, or one with its recurrence off: states of single positions do not fill."""
    if type(model) is not PMNetForCausalLM:
        raise ValueError(f"a {model.config.model_type} is not a PMNet")
    if not model.config.memory_cumsum:
        raise ValueError("a state is not filled without recurrence: memory_cumsum is off in this model")


def capacity(size: int, trials: int, seed: int) -> list[dict[str, Any]]:
    """How often the value of one write is told from `CODES` others after K writes to the same slot; no training.

    Every write draws one of V codes of M normal angles, its own book of codes for each write; a slot holds the sum
    of K such, in the rounding of `phase_bits`. The value of the first write is read by the code with the greatest
    `sum_m c_m sin(S_m)`, which is linear in the geometry that a model reads.

    Args:
        size: M.
        trials: slots that are filled.
        seed: of the codes.

    Returns:
        Rows of scale (standard deviation of a code in radians), phase_bits, writes, accuracy and the limit of
        superposition for these writes (`superposition`).
    """
    generator, found = torch.Generator().manual_seed(seed), []
    for scale in SCALES:
        book = scale * torch.randn(trials, CODES, size, generator=generator, dtype=torch.float64)
        others = scale * torch.randn(trials, max(WRITES) - 1, size, generator=generator, dtype=torch.float64)
        for bits in BITS:
            turns = to_turns(others, bits).cumsum(1, dtype=torch.int32)
            written = to_turns(book[:, 0], bits)  # the codes are drawn alike, so which is written does not matter
            for count in WRITES:
                state = written if count == 1 else written + turns[:, count - 2]
                score = torch.einsum("tvm,tm->tv", book, to_radians(state, torch.float64).sin())
                right = float((score[:, 0] > score[:, 1:].amax(1)).double().mean())  # a tie tells nothing
                found.append({"scale": scale, "phase_bits": bits, "writes": count, "accuracy": right,
                              "limit": superposition(size, count)})  # fmt: skip
    return found


def superposition(size: int, writes: int, codes: int = CODES) -> float:
    """Accuracy of the same reading from a plain sum of K normal codes of M numbers, without circle or rounding.

    Given the sum S, scores of the V - 1 wrong codes are independent and normal, with standard deviation `s |S|`; in
    these units the right one is normal with mean `|S| / (s K)` and variance `1 - 1/K`. `|S| / (s sqrt(K))` has the chi
    distribution of M degrees of freedom, here a normal one of mean `sqrt(M - 1/2)` and variance 1/2.
    """
    x = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    own = math.sqrt((size - 0.5) / writes) + x * math.sqrt(1 - 0.5 / writes)
    chance = torch.special.ndtr(own) ** (codes - 1)
    density = torch.exp(-0.5 * x.square()) / math.sqrt(2 * math.pi)
    return float(torch.trapezoid(density * chance, x))


def rounding_bias(size: int, writes: int, scale: float, bits: int, seed: int) -> dict[str, Any]:
    """The straight-through gradient against the gradient of a loss whose expectation over dithered rounding is exact.

    Loss: `-sum_m cos(S_m - t_m)` of the sum S of K rounded normal rotations, t uniform. When a rotation gets uniform
    noise of one step before it is rounded, it becomes one of two neighbouring multiples with probabilities linear in
    the rotation; so the expected loss is a product of known factors, and its gradient has no rounding in it.

    Args:
        size: M.
        writes: K.
        scale: standard deviation of a rotation, radians.
        bits: `phase_bits`.
        seed: of rotations and targets.

    Returns:
        Cosine of the two gradients over all rotations, and the norm of the straight-through one over the other's.
    """
    generator = torch.Generator().manual_seed(seed)
    rotation = (scale * torch.randn(writes, size, generator=generator, dtype=torch.float64)).requires_grad_()
    target = 2 * math.pi * torch.rand(size, generator=generator, dtype=torch.float64)
    step = 2 * math.pi / 2**bits
    below = (rotation.detach() / step).floor()
    share = rotation / step - below
    factors = torch.exp(1j * below * step) * (1 - share + share * torch.exp(torch.tensor(1j * step)))
    expected = -(factors.prod(0) * torch.exp(-1j * target)).real.sum()
    (smooth,) = torch.autograd.grad(expected, rotation)
    state = to_radians(to_turns(rotation.detach(), bits).sum(0, dtype=torch.int32), torch.float64)
    through = torch.sin(state - target).expand_as(rotation)
    return {"writes": writes, "scale": scale, "phase_bits": bits, **_compared(through, smooth)}


def model_bias(model: PMNetForCausalLM, batch: dict[str, Tensor]) -> list[dict[str, Any]]:
    """The gradient of all parameters at each `phase_bits`, against that of the same weights without rounding (32)."""
    bits, found = model.config.phase_bits, {}
    for value in BITS:
        model.config.phase_bits = value
        model.zero_grad()
        loss, _ = loss_of(model, batch)
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        found[value] = (grads.double(), loss.item())
    model.config.phase_bits = bits
    model.zero_grad()
    return [{"phase_bits": b, "loss": loss, **_compared(grad, found[32][0])} for b, (grad, loss) in found.items()]


def _compared(estimate: Tensor, truth: Tensor) -> dict[str, float]:
    cosine = F.cosine_similarity(estimate.flatten(), truth.flatten(), dim=0)
    return {"cosine": float(cosine), "ratio": float(estimate.norm() / truth.norm())}


def biases(size: int, seeds: int) -> list[dict[str, Any]]:
    """`rounding_bias` over `BITS`, `SCALES` and a few numbers of writes: medians over seeds."""
    found = []
    for writes in (1, 16, 256):
        for scale in SCALES:
            for bits in BITS:
                rows = [rounding_bias(size, writes, scale, bits, seed) for seed in range(seeds)]
                middle = {name: median(row[name] for row in rows) for name in ("cosine", "ratio")}
                found.append({"writes": writes, "scale": scale, "phase_bits": bits, "seeds": seeds, **middle})
    return found
