"""The base of callbacks, which are called at each step, validation and save; their state is in the checkpoints."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from protomamba.checkpoint.file import SaveReport
    from protomamba.storage import SaveError
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats
    from protomamba.train.validation import Validation


class Callback:
    """Base of every callback: each method does nothing until you give it.

    One that has `state_dict()` and `load_state_dict(state)` (plain values and tensors) is saved in the checkpoint under
    `name`. What it draws from the random generators of torch, numpy and Python does not change the run. An exception
    stops the run as any error does. `run` is the `Run`: its trainer, its folder (or None), `run.stop(reason)`.
    """

    @property
    def name(self) -> str:
        """The name of its state in a checkpoint; the callbacks of a run need different names."""
        return f"{type(self).__module__}:{type(self).__qualname__}"

    def on_start(self, run: Run) -> None:
        """Before the first step, after a resume."""

    def on_step(self, run: Run, stats: StepStats) -> None:
        """After each step; `run.is_logged` says whether it is one that --log-every shows, `run.speed` how fast."""

    def on_validation(self, run: Run, result: Validation) -> None:
        """After each validation; `result.best` says whether it is the best so far."""

    def on_before_save(self, run: Run) -> None:
        """Before each checkpoint: write to disk here what must not be older than the checkpoint after a power cut."""

    def on_save(self, run: Run, report: SaveReport) -> None:
        """After each checkpoint that was written."""

    def on_save_error(self, run: Run, error: SaveError) -> None:
        """After a checkpoint that could not be written, if the run continues regardless."""

    def on_message(self, run: Run, text: str, warning: bool) -> None:
        """For each message of the run, or of a callback through `run.note` and `run.warn`."""

    def on_event(self, run: Run, event: str, fields: Mapping[str, Any]) -> None:
        """For each line that a callback gives to metrics.jsonl by `run.log`."""

    def on_finish(self, run: Run, reason: str) -> None:
        """When training has ended and nothing failed, before `on_end`: what is still to be judged and recorded."""

    def on_output_lost(self, run: Run, error: OSError) -> None:
        """Once, when standard output can no longer be written to; the run continues."""

    def on_end(self, run: Run, reason: str) -> None:
        """At the end. reason: `done`, `early_stopping`, `signal`, `failed`, or what a callback gave to `run.stop`."""
