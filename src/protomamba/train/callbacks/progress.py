"""The console as a callback: the header of a run, its steps and validations, its messages, and how it ended."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from protomamba.output import safe
from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.console import Console
from protomamba.train.run_header import goodbye

if TYPE_CHECKING:
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats
    from protomamba.train.validation import Validation


RANKING = ("hit@1", "hit@10", "ndcg@10", "mrr")


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
        print(f"protomamba: standard output: {error.strerror}; the run continues{record}", file=safe(sys.stderr))

    def on_message(self, run: Run, text: str, warning: bool) -> None:
        if warning:
            self.console.warn(text)
        else:
            self.console.line(f"note: {text}")

    def on_step(self, run: Run, stats: StepStats) -> None:
        self.console.step(stats.step, run.step_fields(stats), logged=run.is_logged)

    def on_validation(self, run: Run, result: Validation) -> None:
        nll = "" if result.nll is None else f"  val_nll {result.nll:.4f}  perplexity {result.perplexity:.4g}"
        bits = "" if result.bits_per_byte is None else f"  bits/{result.raw_unit} {result.bits_per_byte:.4f}"
        self.console.line(
            f"step {run.trainer.global_step:>7,}  val_loss {result.loss:.4f}{nll}{bits}"
            f"  val_accuracy {result.accuracy:.4f}"
            f"  (most common class: {result.majority:.4f}){'  best' if result.best else ''}"
        )

    def on_event(self, run: Run, event: str, fields: Mapping[str, Any]) -> None:
        if event == "ranking":
            for who, figures in {"model": fields["figures"], **fields.get("baselines", {})}.items():
                shown = "  ".join(f"{name} {figures[name]:.4f}" for name in RANKING if name in figures)
                self.console.line(f"held out    {who}: {shown}")

    def on_end(self, run: Run, reason: str) -> None:
        self.console.stop()
        self.console.when_lost(None)
        if reason != "failed":
            folder = run.folder.folder if run.folder else None
            reported = any(each.name == "report" for each in run.callbacks)
            self.console.line(goodbye(reason, run.trainer.global_step, folder, reported))
