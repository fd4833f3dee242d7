"""The console as a callback: the header of a run, its steps and validations, its messages, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from protomamba.output import safe
from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.console import Console
from protomamba.train.run_header import goodbye

if TYPE_CHECKING:
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats
    from protomamba.train.validation import Validation


class Progress(Callback):
    """Shows a run on `console` (standard output): `header`, then a line per logged step, or a bar on a terminal."""

    name = "progress"

    def __init__(
        self, console: Console | None = None, header: Mapping[str, str] | None = None, notes: Sequence[str] = ()
    ) -> None:
        self.console, self.header, self.notes = console or Console(), dict(header or {}), list(notes)

    def on_start(self, run: Run) -> None:
        self.console.when_lost(lambda error: self._lost(run, error))
        self.console.header(self.header)
        for note in self.notes:
            self.console.line(f"note: {note}")
        self.console.start(run.trainer.target_step, run.trainer.global_step)

    def _lost(self, run: Run, error: OSError) -> None:
        run.output_lost(error)
        record = f", its record is {run.folder.metrics}" if run.folder else ""
        print(f"protomamba: standard output: {error.strerror}; the run goes on{record}", file=safe(sys.stderr))

    def on_message(self, run: Run, text: str, warning: bool) -> None:
        if warning:
            self.console.warn(text)
        else:
            self.console.line(f"note: {text}")

    def on_step(self, run: Run, stats: StepStats) -> None:
        self.console.step(stats.step, run.step_fields(stats), logged=run.is_logged)

    def on_validation(self, run: Run, result: Validation) -> None:
        nll = "" if result.nll is None else f"  val_nll {result.nll:.4f}  perplexity {result.perplexity:.4g}"
        self.console.line(
            f"step {run.trainer.global_step:>7,}  val_loss {result.loss:.4f}{nll}  val_accuracy {result.accuracy:.4f}"
            f"  (most common class: {result.majority:.4f}){'  best' if result.best else ''}"
        )

    def on_end(self, run: Run, reason: str) -> None:
        self.console.stop()
        self.console.when_lost(None)
        if reason != "failed":
            self.console.line(goodbye(reason, run.trainer.global_step, run.folder.folder if run.folder else None))
