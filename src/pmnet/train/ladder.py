"""A curriculum: stages from easy to hard, climbed by accuracy; the last one is a mixture.

A memory is hard to begin to use: its reads are noise until something is written, and nothing is worth writing until it
is read. A ladder starts where the noise is least (one filler byte, one letter) and gets harder whenever the present
stage is mostly right.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pmnet.data.tasks import Problem, training_batch
from pmnet.train.tasks import Batch


@dataclass(frozen=True)
class Part:
    """One ingredient of the last stage.

    Attributes:
        problem: what is drawn.
        weight: how often, relative to the other parts.
        rows: share of the batch size, for problems with longer rows.
    """

    problem: Problem
    weight: float = 1.0
    rows: float = 1.0


class Ladder:
    """A `Task` that climbs: seven batches in ten come from the present stage, three from any up to it.

    Args:
        stages: problems from easy to hard.
        mixture: what the last stage, after `stages`, is made of.
        batch_size: B.
        seed: of the draw.
        limit: batches after which all stages are left even so, each after its equal part of them: a model that cannot
            learn one still meets the others, one that is quick with the first has more time for the last.
        advance: share of right labels, smoothed over about ten batches, at which the next stage begins.
        processes: that read batches in turns, of which all review or none; they must observe the same numbers.
    """

    source = ""

    def __init__(
        self,
        stages: Sequence[Problem],
        mixture: Sequence[Part],
        batch_size: int,
        seed: int,
        limit: int,
        advance: float = 0.95,
        processes: int = 1,
    ):
        self.stages, self.mixture = list(stages), list(mixture)
        self.batch_size, self.seed, self.limit, self.advance = batch_size, seed, limit, advance
        self.processes = processes
        self.stage, self.smoothed, self.done, self.current = 0, 0.0, 0, True

    def batch(self, index: int) -> Batch:
        """Batch `index` at the present stage."""
        review, earlier, generator = self._choice(index)
        if index % self.processes:
            review, earlier, _ = self._choice(index - index % self.processes)
        self.current = not (review and earlier < self.stage)
        if not self.current:
            return training_batch(self.stages[earlier].draw(self.batch_size, generator))
        if self.stage < len(self.stages):
            return training_batch(self.stages[self.stage].draw(self.batch_size, generator))
        weights = torch.tensor([part.weight for part in self.mixture])
        part = self.mixture[int(torch.multinomial(weights, 1, generator=generator))]
        return training_batch(part.problem.draw(max(1, round(part.rows * self.batch_size)), generator))

    def _choice(self, index: int) -> tuple[bool, int, torch.Generator]:
        """Whether to review, an earlier stage, and the generator of the rest of batch `index`."""
        # a generator keeps 32 bits of what seeds it: an odd multiple keeps the streams of different seeds apart
        generator = torch.Generator().manual_seed((self.seed * 2_654_435_761 + index) % 2**32)
        review = torch.rand((), generator=generator).item() < 0.3
        return review, int(torch.randint(0, self.stage + 1, (), generator=generator)), generator

    def observe(self, correct: float) -> None:
        """Climb when the present stage is mostly right, or its time is up."""
        if self.current:
            self.smoothed = 0.9 * self.smoothed + 0.1 * correct
        self.done += 1
        late = self.done * len(self.stages) >= self.limit * (self.stage + 1)
        if self.stage < len(self.stages) and (late or self.smoothed > self.advance):
            self.stage, self.smoothed = self.stage + 1, 0.3

    def state(self) -> dict[str, Any]:
        """The present stage, its smoothed accuracy and the batches seen."""
        return {name: getattr(self, name) for name in _STATE}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at that stage."""
        for name in _STATE:
            setattr(self, name, state[name])


_STATE = ("stage", "smoothed", "done", "current")
