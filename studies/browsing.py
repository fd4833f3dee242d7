"""A table of events with a known structure that counting pairs of items cannot find: `browsing.py OUT.csv [EVENTS]`.

20,000 items in 400 series of 50. A visitor follows one series with a stride of its own (1, 2, 3 or 5), and is drawn
away again and again: three events in ten are of whatever is popular. Where the visitor goes on behind such a detour
stands further back than the last item, and which of the strides it is needs two items: pairs of neighbours tell
neither. Series and single items are as unequal as in shops (Zipf).
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

SERIES, LONG, STRIDES, DETOUR = 400, 50, (1, 2, 3, 5), 0.3
Integers = npt.NDArray[np.int64]


def zipf(size: int, power: float) -> npt.NDArray[np.float64]:
    """Shares of `size` things that fall with their rank."""
    shares = np.arange(1, size + 1) ** -power
    return shares / shares.sum()


def events(count: int, seed: int = 0) -> tuple[Integers, Integers, Integers]:
    """Visitor, time and item of about `count` events, by time."""
    drawn = np.random.default_rng(seed)
    lengths = drawn.integers(6, 35, count // 20)
    visitors = np.repeat(np.arange(len(lengths)), lengths)
    place = np.arange(len(visitors)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    series = drawn.choice(SERIES, len(lengths), p=zipf(SERIES, 0.7))
    stride, start = drawn.choice(STRIDES, len(lengths)), drawn.integers(0, LONG, len(lengths))
    away = (drawn.random(len(visitors)) < DETOUR) & (place > 0)
    followed = np.cumsum(~away)
    followed -= np.repeat(followed[np.cumsum(lengths) - lengths], lengths)  # steps along the series so far
    item = series[visitors] * LONG + (start[visitors] + stride[visitors] * followed) % LONG
    popular = drawn.permutation(SERIES * LONG)[drawn.choice(SERIES * LONG, len(visitors), p=zipf(SERIES * LONG, 1.0))]
    time = drawn.integers(0, 10_000_000, len(lengths))[visitors] + 60 * place
    order = np.argsort(time, kind="stable")
    return visitors[order], time[order], np.where(away, popular, item)[order]


def write(path: Path, count: int) -> None:
    """The table as CSV."""
    rows = np.stack(events(count), axis=1)
    np.savetxt(path, rows, fmt="v%d,%d,item-%d", header="visitor,time,item", comments="")


if __name__ == "__main__":
    write(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1_500_000)
