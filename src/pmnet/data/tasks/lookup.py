"""N-gram lookup (after Jelassi et al., arXiv 2402.01032): what follows these n letters in the string?

With a suffix key the string comes first, `COPY string EOS PASTE key`, and everything about it has to be remembered;
with a prefix key the question comes first, `PASTE key COPY string EOS`, and only the answer has to be. The answer is
the letter that follows the key in the string. Keys occur once in their string.

Shapes: B sequences, n letters of a key.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pmnet.data.tasks.copy_paste import marked
from pmnet.data.tasks.episodes import Episodes, Span
from pmnet.model.tokenizer import PASTE

LONGEST = 2**14  # letters of a string: every key in it is compared with every other


@dataclass(frozen=True)
class Lookup:
    """A distribution of lookup episodes.

    Attributes:
        length: letters of the string; the same for all rows of a batch, drawn from this range.
        order: n.
        key: `"suffix"` or `"prefix"`.
        letters: letters are byte values below this number.
    """

    length: tuple[int, int] = (50, 50)
    order: int = 3
    key: str = "suffix"
    letters: int = 256

    def __post_init__(self) -> None:
        if self.key not in ("suffix", "prefix"):
            raise ValueError(f"the key of a lookup is 'suffix' or 'prefix', not {self.key!r}")
        if not 1 <= self.order < self.length[0] <= self.length[1]:
            raise ValueError(f"no room for a key and its answer in {self}")
        if self.length[1] > LONGEST:
            raise ValueError(f"the string of a lookup has at most {LONGEST:,} letters, got {self.length[1]:,}")

    def draw(self, rows: int, generator: torch.Generator) -> Episodes:
        """`rows` episodes."""
        length = int(torch.randint(self.length[0], self.length[1] + 1, (), generator=generator))
        strings = torch.randint(self.letters, (rows, length), generator=generator)
        windows = strings.unfold(1, self.order + 1, 1)  # [B, length - n, n + 1]: a key and its answer
        once = self._once(strings)
        if not once.any(1).all():
            raise ValueError(f"{self.letters} letters are too few for a key of {self.order} that occurs once")
        chance = torch.rand(once.shape, generator=generator)
        place = torch.where(once, chance, -1.0).argmax(1)
        found = windows[torch.arange(rows), place]
        key, answer = F.pad(found[:, :-1], (1, 0), value=PASTE), found[:, -1:]
        answered = Span(answer, torch.ones_like(answer, dtype=torch.bool))
        text = Span(marked(strings))
        return Episodes((text, Span(key), answered) if self.key == "suffix" else (Span(key), text, answered))

    def _once(self, strings: Tensor) -> Tensor:
        """Bool `[B, length - n]`: whether the n-gram that begins here, and has a letter behind it, occurs only once."""
        grams = strings.unfold(1, self.order, 1)
        same = (grams.unsqueeze(1) == grams.unsqueeze(2)).all(3)
        return (same.sum(2) == 1)[:, :-1]
