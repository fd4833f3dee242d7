"""Callbacks that the runs of the tests name."""

from __future__ import annotations

import os
import signal

from protomamba.train.callbacks.base import Callback
from protomamba.train.run import Run
from protomamba.train.trainer import StepStats


class StopAtThree(Callback):
    """Ends the run after its third step, as a time limit of the user's would."""

    def on_step(self, run: Run, stats: StepStats) -> None:
        if stats.step == 3:
            run.stop()


class SignalTheLauncher(Callback):
    """Signals torch's launcher, this process's parent, after the third step."""

    def on_step(self, run: Run, stats: StepStats) -> None:
        if stats.step == 3:
            os.kill(os.getppid(), signal.SIGTERM)
