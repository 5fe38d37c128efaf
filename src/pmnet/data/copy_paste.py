"""Copy-paste: remember a string across filler that attention cannot see over, and write it again.

One sequence is `lead filler, BOS, k letters, gap filler, PASTE, the same k letters`. Letters are uniform over the 64
byte values 64-127, filler over the 32 byte values 0-31. The answer has to come from memory whenever
`gap >= receptive_field`: the last letter's position is then out of reach of the position that must produce it.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pmnet.model.tokenizer import BOS, PAD, PASTE

LETTERS = (64, 128)
FILLER = (0, 32)


class CopyBatch(NamedTuple):
    """Sequences of one string length; rows of a batch differ in gap and lead, padding stands on the left."""

    input_ids: Tensor  # [B, T] int64
    attention_mask: Tensor  # [B, T] int64, 0 at padding
    strings: Tensor  # [B, k] int64, also the last k positions of input_ids


def copy_batch(batch_size: int, length: int, gap: tuple[int, int], lead: int, generator: torch.Generator,
               width: int | None = None) -> CopyBatch:  # fmt: skip
    """Draw a batch.

    Args:
        batch_size: B.
        length: k, letters of the string.
        gap: least and greatest number of filler bytes between string and paste marker, per row uniform.
        lead: greatest number of filler bytes before BOS, per row uniform from 0.
        generator: source of randomness, on the CPU.
        width: T, to pad to; by default the longest row possible.

    Returns:
        The batch on the CPU.

    Raises:
        ValueError: if a sequence does not fit into `width`.
    """
    longest = 2 * length + 2 + gap[1] + lead
    width = longest if width is None else width
    if width < longest or length < 1 or gap[0] < 0 or gap[1] < gap[0]:
        raise ValueError(f"copy-paste of {length} letters over gaps {gap} needs {longest} positions, got {width}")

    def uniform(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    ids = uniform(*FILLER, batch_size, width)
    strings = uniform(*LETTERS, batch_size, length)
    gaps, leads = uniform(gap[0], gap[1] + 1, batch_size, 1), uniform(0, lead + 1, batch_size, 1)
    paste = width - length - 1
    begin = paste - gaps - length - 1
    place = torch.arange(width) - begin  # 0 at BOS
    ids = torch.where(place == 0, BOS, ids)
    inside = (place >= 1) & (place <= length)
    ids = torch.where(inside, strings.gather(1, (place - 1).clamp(0, length - 1)), ids)
    ids[:, paste] = PASTE
    ids[:, paste + 1 :] = strings
    real = place >= -leads
    return CopyBatch(torch.where(real, ids, PAD), real.long(), strings)
