"""Callbacks that the runs of the tests name."""

from __future__ import annotations

from protomamba.train.callbacks.base import Callback
from protomamba.train.run import Run
from protomamba.train.trainer import StepStats


class StopAtThree(Callback):
    """Ends the run after its third step, as a time limit of the user's would."""

    def on_step(self, run: Run, stats: StepStats) -> None:
        if stats.step == 3:
            run.stop()
