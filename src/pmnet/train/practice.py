"""Text with practice in between: every n-th batch of a language model's training is of a synthetic task."""

from typing import Any

from pmnet.train.ladder import Ladder
from pmnet.train.tasks import Batch, ByteTask


class Practice:
    """A `Task` of text in which every n-th batch is one of `ladder`; a state that is carried skips those.

    Args:
        text: read in order, none of it left out.
        ladder: what is practised; it alone observes how much of its own batches is right.
        every: n, at least 2.
        processes: that read batches in turns; all of them practise in the same steps.
    """

    def __init__(self, text: ByteTask, ladder: Ladder, every: int, processes: int = 1):
        if every < 2:
            raise ValueError(f"practice is every 2nd batch or less often, not every {every}")
        self.text, self.ladder, self.every, self.processes = text, ladder, every, processes
        self.source = text.source
        self.practised = False

    def batch(self, index: int) -> Batch:
        """Batch `index`: of the ladder in steps 0, n, 2n, ..., or else the next one of the text."""
        step, process = divmod(index, self.processes)
        self.practised = step % self.every == 0
        if self.practised:
            return self.ladder.batch(index)
        return self.text.batch((step - step // self.every - 1) * self.processes + process)

    def observe(self, correct: float) -> None:
        """Climb, if this was practice."""
        if self.practised:
            self.ladder.observe(correct)

    def state(self) -> dict[str, Any]:
        """The ladder's, and whether the last batch was practice."""
        return self.ladder.state() | {"practised": self.practised}

    def restore(self, state: dict[str, Any]) -> None:
        """Continue at that stage."""
        self.ladder.restore(state)
        self.practised = state["practised"]
