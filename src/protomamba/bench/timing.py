"""Times things against each other.

Everything takes its turn in each round, so that what disturbs the machine for a while disturbs all of them; a ratio is
formed within a round, and its median over the rounds is what counts.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

# A turn repeats what is quick until it has run about this long.
TURN_SECONDS = 0.05
CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Ratio:
    """The median of a ratio over the rounds, and its smallest and largest value."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f}-{self.high:.2f})"


@dataclass(frozen=True)
class Samples:
    """Seconds a call, by name and round."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, to: str) -> Ratio:
        """seconds[name] / seconds[to], formed round by round."""
        return spread([a / b for a, b in zip(self.seconds[name], self.seconds[to], strict=True)])


def spread(values: list[float]) -> Ratio:
    return Ratio(statistics.median(values), min(values), max(values))


def interleave(runs: Mapping[str, Callable[[], object]], rounds: int, clock: str = "wall") -> Samples:
    """`rounds` turns of each of `runs`, in rotation, after one call of each that is not counted.

    clock: "wall", or "cpu" for the processor time of the process, which a busy machine disturbs less but which counts
    waiting threads as work: for one thread only.
    """
    now = CLOCKS[clock]
    repeats = {}
    for name, run in runs.items():
        start = now()
        run()
        repeats[name] = max(1, math.ceil(TURN_SECONDS / max(now() - start, 1e-7)))
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = now()
            for _ in range(repeats[name]):
                run()
            seconds[name].append((now() - start) / repeats[name])
    return Samples(seconds)
