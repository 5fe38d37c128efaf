"""Timing in turns: A B C A B C ..., so that whatever else the machine does falls on all contenders alike.

A run of a contender that takes longer than its share of the time budget is measured at a shorter length, or left out;
either way the result says so.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median
from typing import Any

Run = Callable[[], object]

ROUNDS = 3  # at least so many, whatever the budget


@dataclass(frozen=True)
class Entry:
    """One contender of a case.

    Attributes:
        name: how the result calls it; the first entry is the one that the others are compared with.
        prepare: `prepare(length)` gives a run of `length` positions per sequence, to be called over and over.
        needs: FLOP or bytes that a run of `length` positions cannot do without.
        facts: anything to store beside its figures.
    """

    name: str
    prepare: Callable[[int], Run]
    needs: Callable[[int], float]
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        repeats: rounds, each of which runs every contender once.
        seconds: budget; `ROUNDS` rounds (or `repeats`, if fewer) are measured in any case.
        wait: returns when the device is idle.
        clock: seconds that pass.
    """

    repeats: int
    seconds: float
    wait: Callable[[], None] = lambda: None
    clock: Callable[[], float] = time.perf_counter

    def timed(self, run: Run) -> float:
        """Seconds of one run, until the device is idle again."""
        self.wait()
        start = self.clock()
        run()
        self.wait()
        return self.clock() - start


def compare(
    entries: list[Entry], batch: int, length: int, shortest: int, plan: Plan, limit: float
) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Warm up, then time all entries in turns.

    Args:
        entries: what to compare.
        batch: sequences of a run.
        length: positions per sequence; for an entry that is too slow it is halved down to `shortest`, and one that is
            too slow even there is left out, unless it is the first, which the others are compared with.
        shortest: the least length that still means something.
        plan: rounds and budget.
        limit: the machine's best, in units of `needs` per second.

    Returns:
        One row per entry, see `_row`, and the entries left out with the reason.
    """
    start = plan.clock()
    share = plan.seconds / (len(entries) * (ROUNDS + 1))
    runs, lengths, left_out = {}, {}, []
    for entry in entries:
        run, fitted, seconds = _fit(entry, length, shortest, share, plan)
        if seconds > share and entry is not entries[0]:
            reason = f"one run of {fitted} positions takes {seconds:.2g} s, more than its share of {share:.2g} s"
            left_out.append({"contender": entry.name, "reason": reason})
        else:
            runs[entry.name], lengths[entry.name] = run, fitted
    samples = alternate(runs, plan, start)
    reference = entries[0].name
    base = [s / lengths[reference] for s in samples[reference]]
    rows = [
        _row(entry, batch, lengths[entry.name], length, samples[entry.name], base, limit)
        for entry in entries
        if entry.name in samples
    ]
    return rows, left_out


def alternate(runs: dict[str, Run], plan: Plan, start: float) -> dict[str, list[float]]:
    """Seconds of every run, round by round, until `plan.repeats` or `plan.seconds` after `start`."""
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for done in range(plan.repeats):
        if done >= ROUNDS and plan.clock() - start > plan.seconds:
            break
        for name, run in runs.items():
            samples[name].append(plan.timed(run))
    return samples


def spread(values: list[float]) -> dict[str, float]:
    """Median, least and greatest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def _fit(entry: Entry, length: int, shortest: int, share: float, plan: Plan) -> tuple[Run, int, float]:
    """The longest warmed-up run that keeps to its share of the budget, or the shortest: the run, length, seconds.

    Lengths grow from the shortest, so that it does not take a long run to find a contender slow: the next length is
    tried only if it would fit, were the time to grow as it did last, and at least in proportion.
    """
    lengths = [length]
    while lengths[-1] // 2 >= shortest:
        lengths.append(lengths[-1] // 2)

    def measured(candidate: int) -> tuple[Run, int, float]:
        run = entry.prepare(candidate)
        run()
        return run, candidate, plan.timed(run)

    best, growth = measured(lengths.pop()), 2.0
    while lengths and best[2] * growth <= share:
        longer = measured(lengths.pop())
        if longer[2] > share:
            break
        best, growth = longer, max(2.0, longer[2] / best[2])
    return best


def _row(
    entry: Entry, batch: int, length: int, wanted: int, seconds: list[float], base: list[float], limit: float
) -> dict[str, Any]:
    """A contender's figures.

    `seconds` of every run; `positions_per_second`; `times_ours`, its time per position over that of the first entry in
    the same round; `needs` FLOP or bytes a run; `fraction_of_limit`, needs per second of the median run over the limit.
    """
    return {
        "contender": entry.name,
        **entry.facts,
        "batch": batch,
        "length": length,
        "shortened": length < wanted,
        "seconds": seconds,
        "positions_per_second": spread([batch * length / s for s in seconds]),
        "times_ours": spread([s / length / b for s, b in zip(seconds, base, strict=True)]),
        "needs": entry.needs(length),
        "fraction_of_limit": entry.needs(length) / median(seconds) / limit,
    }
