"""Fewer points of a curve, none of its peaks lost: a page of a million steps stays small."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from protomamba.report.record import Series

MAX_POINTS = 2_000


@dataclass
class Thinned(Series):
    """Points of a curve, and around each the mean of all that it stands for: an average of peaks would mislead."""

    means: list[float] = field(default_factory=list)


def thin(series: Series, limit: int = MAX_POINTS) -> Thinned:
    """At most `limit` points (>= 4): the first, the last, and the lowest and highest of equal stretches between."""
    count = len(series.steps)
    if count <= limit:
        return Thinned(series.steps, series.values, series.values)
    stretches = (limit - 2) // 2
    bounds = [1 + i * (count - 2) // stretches for i in range(stretches + 1)]
    means = {0: series.values[0], count - 1: series.values[-1]}
    for start, stop in itertools.pairwise(bounds):
        mean = sum(series.values[start:stop]) / (stop - start)
        means |= dict.fromkeys(_extremes(series.values, start, stop), mean)
    chosen = sorted(means)
    return Thinned([series.steps[i] for i in chosen], [series.values[i] for i in chosen], [means[i] for i in chosen])


def _extremes(values: Sequence[float], start: int, stop: int) -> set[int]:
    stretch = range(start, stop)
    return {min(stretch, key=values.__getitem__), max(stretch, key=values.__getitem__)}


def smoothed(values: Sequence[float], share: float) -> list[float]:
    """Moving average over about this share of the curve: falling weights, with Adam's correction at the start."""
    factor = math.exp(-1 / (share * len(values)))
    mean = weight = 0.0
    averages = []
    for value in values:
        mean, weight = factor * mean + (1 - factor) * value, factor * weight + 1 - factor
        averages.append(mean / weight)
    return averages
