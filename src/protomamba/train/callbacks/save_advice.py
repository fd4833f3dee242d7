"""Tells a run with large checkpoints what a save costs, and how rarely to save."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.checkpoint.file import SaveReport
    from protomamba.train.run import Run

LARGE = 1 << 30  # bytes of a checkpoint
SHARE = 0.05  # of the time that saving should stay below


class SaveAdvice(Callback):
    """At the start: how large a checkpoint of `size` bytes is. After the first save, whose time and the steps' are then
    known: the --save-every that keeps saves below SHARE of the time."""

    def __init__(self, size: int) -> None:
        self.size, self._told = size, False

    def on_start(self, run: Run) -> None:
        if self.size >= LARGE:
            run.note(
                f"a checkpoint takes {self.size / 1e9:.1f} GB on the disk (latest, best and {run.keep_last} older, one "
                "more while it is written); weights and moments take as much memory, a step's activations come on top"
            )

    def on_save(self, run: Run, report: SaveReport) -> None:
        if self.size < LARGE or self._told or not run.speed:
            return
        self._told = True
        save_s, step_s = report.save_ms / 1e3, run.speed["step_ms"] / 1e3
        share = save_s / (save_s + run.save_every * step_s)
        text = (
            f"a save took {save_s:.1f} s, a step {1e3 * step_s:.0f} ms: --save-every {rare_enough(save_s, step_s)} or "
            f"more keeps saves under {SHARE:.0%} of the time (at {run.save_every:,} they take {share:.0%})"
        )
        (run.warn if share > SHARE else run.note)(text)


def rare_enough(save_s: float, step_s: float) -> int:
    """Steps between saves that keep them below SHARE of the time, rounded up to two digits."""
    steps = max(1.0, save_s * (1 - SHARE) / (SHARE * step_s))
    unit = 10.0 ** max(0, math.floor(math.log10(steps)) - 1)
    return int(math.ceil(steps / unit) * unit)
