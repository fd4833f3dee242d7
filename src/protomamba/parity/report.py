"""What every parity command returns: named comparisons, each with its worst error and the tolerance it was held to."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from protomamba import kernels
from protomamba.errors import UserError
from protomamba.train.callbacks.console import rich_console


@dataclass(frozen=True)
class Row:
    """One comparison. An error that is not a number is a failure, whatever the tolerance."""

    name: str
    worst: float
    tolerance: float
    note: str = ""

    @property
    def ok(self) -> bool:
        return self.worst <= self.tolerance


@dataclass
class Report:
    """A table of comparisons under a title, and the facts (versions, shapes, seed) they were made with."""

    title: str
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """All rows hold; a report that compared nothing does not."""
        return bool(self.rows) and all(row.ok for row in self.rows)

    def check(self, name: str, worst: float, tolerance: float, note: str = "") -> Row:
        """Append one comparison and return it."""
        row = Row(name, float(worst), float(tolerance), note)
        self.rows.append(row)
        return row

    def worst_of(self, name: str, errors: dict[str, float], tolerance: float) -> Row:
        """Append the largest of several errors as one row; the note says which of how many it was."""
        where = max(errors, key=lambda key: math.inf if math.isnan(errors[key]) else errors[key])
        return self.check(name, errors[where], tolerance, f"worst of {len(errors)}: {where}")

    def extend(self, other: Report, prefix: str = "") -> None:
        """Take over the rows of another report, their names behind `prefix`, and the facts not yet known."""
        self.rows += [Row(prefix + row.name, row.worst, row.tolerance, row.note) for row in other.rows]
        self.facts = {**other.facts, **self.facts}

    def to_json(self) -> dict[str, Any]:
        rows = [
            {"name": r.name, "worst": _finite(r.worst), "tolerance": r.tolerance, "ok": r.ok, "note": r.note}
            for r in self.rows
        ]
        return {"title": self.title, "ok": self.ok, "facts": self.facts, "rows": rows}

    def write(self, path: Path) -> None:
        """Write the report as JSON; a path that cannot be written raises UserError."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"report {path}: cannot be written: {error.strerror}") from None

    def print(self, console: Console | None = None) -> None:
        """The report as a table for people, worst news included."""
        console = console or rich_console()
        caption = " · ".join(f"{name} {value}" for name, value in self.facts.items())
        table = Table(title=self.title, caption=caption or None, title_justify="left", caption_justify="left")
        for heading, side in (("check", "left"), ("worst error", "right"), ("tolerance", "right"), ("", "left")):
            table.add_column(heading, justify=side, no_wrap=side == "right")  # type: ignore[arg-type]
        table.add_column("note", style="dim", overflow="fold", min_width=18)
        for row in self.rows:
            verdict = "[green]ok[/]" if row.ok else "[bold red]FAILED[/]"
            table.add_row(row.name, f"{row.worst:.2e}", f"{row.tolerance:.0e}", verdict, row.note)
        console.print(table)
        console.print(f"{sum(r.ok for r in self.rows)} of {len(self.rows)} checks hold", highlight=False)


def _finite(value: float) -> float | None:
    """JSON has no NaN: an error that is not a number is null (and its row not ok)."""
    return value if math.isfinite(value) else None


def max_abs(found: Any, expected: Any) -> float:
    """Largest absolute difference of two arrays or tensors of the same shape, computed in float64."""
    found64, expected64 = _same_shape(found, expected)
    return float(np.max(np.abs(found64 - expected64), initial=0.0))


def _same_shape(found: Any, expected: Any) -> tuple[np.ndarray, np.ndarray]:
    found64, expected64 = np.asarray(found, dtype=np.float64), np.asarray(expected, dtype=np.float64)
    if found64.shape != expected64.shape:
        raise ValueError(f"cannot compare shapes {found64.shape} and {expected64.shape}")
    return found64, expected64


def versions(*packages: str) -> dict[str, str]:
    """Facts for a report: the processor, the kernels that float32 took on it, the installed version of each package."""
    path = kernels.describe()
    facts = {"machine": platform.machine(), "kernels": f"{path['kernels']}, {path['cpu_level']}"}
    return {**facts, **{name: metadata.version(name) for name in packages}}


def missing(package: str, command: str, error: ImportError) -> UserError:
    """What to say where an optional package cannot be imported: which, why, and the line that installs it."""
    return UserError(
        f"{command} needs {package}, which cannot be imported ({error}): pip install protomamba[{package}]"
    )


def merge(title: str, reports: Iterable[Report]) -> Report:
    """One report of many; each row's name starts with the title of the report it came from."""
    whole = Report(title)
    for report in reports:
        whole.extend(report, f"{report.title}: ")
    return whole
