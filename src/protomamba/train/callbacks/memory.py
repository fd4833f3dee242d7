"""Compares what a run needs with what a control group or ulimit allows: the system kills without warning."""

from __future__ import annotations

import resource
from typing import TYPE_CHECKING

from protomamba.memory import Limit, memory_limit
from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats

NEAR = 0.8


class MemoryWatch(Callback):
    """Tells what a run needs at least where a limit is set, and warns where it comes near: before and after a step."""

    def __init__(self) -> None:
        self._limit: Limit | None = None

    def on_start(self, run: Run) -> None:
        self._limit = limit = memory_limit()
        if limit is None:
            return
        needed = limit.held + _to_come(run)
        text = f"at least {needed:,} bytes are needed, and {limit.by} allows {limit.allowed:,}"
        if needed > NEAR * limit.allowed:
            run.warn(f"{text}: the run may be killed without warning; allow more memory, or use a smaller model")
        else:
            run.note(text)

    def on_step(self, run: Run, stats: StepStats) -> None:
        """The first step shows what all need; validation and saving stay below it."""
        if self._limit is None:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if peak > NEAR * self._limit.allowed:
            run.warn(
                f"step {stats.step} took the process to {peak:,} bytes, and {self._limit.by} allows "
                f"{self._limit.allowed:,}: beyond that it is killed without warning; a smaller --batch-size needs less"
            )
        self._limit = None


def _to_come(run: Run) -> int:
    """The gradients and the optimizer's state, which the first step makes; activations come on top."""
    gradients = sum(p.numel() * p.element_size() for p in run.trainer.model.parameters() if p.requires_grad)
    return gradients + run.trainer.optimizer.bytes_to_come()
