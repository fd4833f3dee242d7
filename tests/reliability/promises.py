"""Counts the trials of every promise and prints one table at the end: promise, trials, failures.

PROTOMAMBA_RELIABILITY_REPORT=FILE writes the same as JSON. Tests elsewhere that show a promise too are in `ELSEWHERE`:
each of their cases that runs in the same session is a trial.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.reliability.elsewhere import ELSEWHERE

PROMISES = {
    1: "SIGKILL at random moments, saving every step",
    2: "the n-th I/O call of a save fails, or the process dies there",
    3: "damaged checkpoints and shards are detected and named",
    4: "resume is exact: random cut plans against the uncut run",
    5: "SIGTERM and SIGINT at random moments",
    6: "NaN and Inf poison nothing",
    7: "bad input is one line",
    8: "dead and stuck loader workers",
    9: "one run in a folder",
    10: "no pickle, no code from files, no network, nothing outside",
    11: "memory and open files stay flat",
    12: "output that breaks costs its text only",
    13: "hostile files of every kind are read or refused in one line",
    14: "memory that runs out, and a run that was killed, are told",
}


class Trials:
    """The trials of one test: each is told how it went, and `finish` fails the test if any went wrong."""

    def __init__(self, promise: int, rows: dict[int, list[int]]) -> None:
        self._row = rows.setdefault(promise, [0, 0])
        self.problems: list[str] = []

    def add(self, problem: str | None, count: int = 1) -> None:
        """One trial (or `count` of them); `problem` is None if it went well."""
        self._row[0] += count
        if problem is not None:
            self._row[1] += 1
            self.problems.append(problem)

    def finish(self) -> None:
        shown = "\n".join(self.problems[:10])
        assert not self.problems, f"{len(self.problems)} trials failed:\n{shown}"


# Promise -> trials, failures: of this process.
rows: dict[int, list[int]] = {}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker of a run on several cores sends what it counted to where the table is printed."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["promises"] = {str(number): row for number, row in rows.items()}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add what a worker counted."""
    for number, (count, failed) in getattr(node, "workeroutput", {}).get("promises", {}).items():
        row = rows.setdefault(int(number), [0, 0])
        row[0], row[1] = row[0] + count, row[1] + failed


def count_elsewhere(stats: dict[str, list[Any]]) -> None:
    """Add the cases of `ELSEWHERE`, from the session's reports."""
    for outcome in ("passed", "failed", "error"):
        for report in stats.get(outcome, []):
            promise = ELSEWHERE.get(report.nodeid.partition("::")[0])
            if promise is not None:
                row = rows.setdefault(promise, [0, 0])
                row[0] += 1
                row[1] += outcome != "passed"


def pytest_terminal_summary(terminalreporter: Any) -> None:
    count_elsewhere(terminalreporter.stats)
    if not rows:
        return
    terminalreporter.section("promises of the reliability design")
    terminalreporter.write_line(f"{'promise':<66}{'trials':>8}{'failures':>10}")
    for number, about in PROMISES.items():
        count, failed = rows.get(number, (0, 0))
        figures = f"{count:>8,}{failed:>10,}" if count else f"{'not run':>8}"
        terminalreporter.write_line(f"{number:>2} {about:<63}{figures}")
    if file := os.environ.get("PROTOMAMBA_RELIABILITY_REPORT"):
        table = [{"promise": n, "about": PROMISES[n], "trials": c, "failures": f} for n, (c, f) in sorted(rows.items())]
        Path(file).write_text(json.dumps(table, indent=2) + "\n")
