"""metrics.jsonl as a callback: a line for each step that is due, each validation, each checkpoint, start and end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.metrics import MetricsLog

if TYPE_CHECKING:
    from protomamba.checkpoint.file import SaveReport
    from protomamba.storage import SaveError
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats
    from protomamba.train.validation import Validation


class MetricsRecorder(Callback):
    """Writes `path` for as long as the run lasts. `facts` go into the first line, beside what the run knows itself."""

    name = "metrics"

    def __init__(self, path: Path, facts: Mapping[str, Any] | None = None) -> None:
        self.path, self.facts = path, dict(facts or {})
        self.log: MetricsLog | None = None

    def on_start(self, run: Run) -> None:
        resumed_step = run.trainer.global_step if run.resumed_from else None
        acknowledged = run.on_save_error == "stop"
        self.log = MetricsLog(self.path, resumed_step=resumed_step, warn=run.warn, must_acknowledge=acknowledged)
        self.log.log("run", step=run.trainer.global_step, **{**run.facts(), **self.facts})

    def on_step(self, run: Run, stats: StepStats) -> None:
        if self.log is not None and run.is_logged:
            self.log.log("train", **run.step_fields(stats))

    def on_validation(self, run: Run, result: Validation) -> None:
        if self.log is not None:
            self.log.log("validation", step=run.trainer.global_step, **result.fields())

    def on_before_save(self, run: Run) -> None:
        if self.log is not None:
            self.log.sync()  # a run resumed from this checkpoint will not write the lines before it again

    def on_save(self, run: Run, report: SaveReport) -> None:
        if self.log is not None:
            said = {"path": report.path.name, "bytes": report.bytes, "save_ms": report.save_ms}
            self.log.log("checkpoint", step=run.trainer.global_step, **said, best=run.saved_best)

    def on_save_error(self, run: Run, error: SaveError) -> None:
        if self.log is not None:
            self.log.log("checkpoint_failed", step=run.trainer.global_step, error=str(error))

    def on_message(self, run: Run, text: str, warning: bool) -> None:
        if self.log is not None and warning:
            self.log.log("warning", step=run.trainer.global_step, text=text)

    def on_event(self, run: Run, event: str, fields: Mapping[str, Any]) -> None:
        if self.log is not None:
            self.log.log(event, step=run.trainer.global_step, **fields)

    def on_output_lost(self, run: Run, error: OSError) -> None:
        if self.log is not None:
            self.log.log("output_lost", step=run.trainer.global_step, error=error.strerror)

    def on_end(self, run: Run, reason: str) -> None:
        if self.log is None:
            return
        failed = {"error": str(run.error)} if run.error else {}
        skipped = run.trainer.skipped_total
        self.log.log("end", step=run.trainer.global_step, reason=reason, **failed, skipped_updates=skipped)
        self.log.close()
        self.log = None
