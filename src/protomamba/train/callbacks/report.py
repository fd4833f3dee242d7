"""The page of a run, written when it ends: report.html in its folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protomamba.report.page import write_report
from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.train.run import Run

REPORT = "report.html"


class ReportWriter(Callback):
    """Writes the report however the run ended; a failure to write it is reported, and changes nothing else."""

    name = "report"

    def on_end(self, run: Run, reason: str) -> None:
        if run.folder is None:
            return
        try:
            write_report([run.folder.folder], run.folder.folder / REPORT)
        except Exception as error:  # the run itself is over and saved: its exit code must not depend on a picture
            run.warn(f"no {REPORT}: {type(error).__name__}: {error}; protomamba report {run.folder.folder} writes it")
