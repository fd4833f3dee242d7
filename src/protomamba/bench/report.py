"""What was measured, as a table for people, as Markdown for the documentation, as JSON for machines."""

from __future__ import annotations

import dataclasses
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from protomamba import kernels
from protomamba.bench.timing import Ratio

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Section:
    """Rows with the same columns, under a title; the notes say how to read them."""

    title: str
    rows: Sequence[Row]
    notes: Sequence[str] = ()


def facts(command: str) -> dict[str, str]:
    """What the numbers were made with. The load average tells how much else the machine was doing."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    machine = {"cpu": _cpu_model(), "cores": str(os.cpu_count()), "load average": load}
    machine["targets"] = target_row()
    return {"command": command, "date": date.today().isoformat(), **machine, **kernels.describe()}


def target_row() -> str:
    """Which of the figures to reach are meant for this CPU: those of AMX, of Zen 4 and 5, or none."""
    flags = _cpuinfo("flags").split()
    if "amx_bf16" in flags:
        return "AMX"
    return "Zen 4 and 5" if _cpuinfo("vendor_id") == "AuthenticAMD" and "avx512f" in flags else "none for this CPU"


def _cpu_model() -> str:
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def _cpuinfo(name: str) -> str:
    """A field of the first CPU in Linux's list; empty where there is none."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(name)), "")


def shown(value: Any) -> str:
    """A cell: ratios as median (low-high), numbers to three or four digits."""
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}" if value >= 0.01 or value == 0 else f"{value:.1e}"
    return str(value)


def to_json(sections: Sequence[Section], about: Mapping[str, str]) -> dict[str, Any]:
    def plain(value: Any) -> Any:
        return dataclasses.asdict(value) if isinstance(value, Ratio) else value

    return {
        "facts": dict(about),
        "sections": [
            {"title": s.title, "notes": list(s.notes), "rows": [{k: plain(v) for k, v in r.items()} for r in s.rows]}
            for s in sections
        ],
    }


def to_markdown(sections: Sequence[Section], about: Mapping[str, str]) -> str:
    """One Markdown table a section, its rows turned on their side: what was measured downwards, the shapes across."""
    lines = ["# Speed", "", " · ".join(f"{name}: {value}" for name, value in about.items())]
    for section in sections:
        lines += ["", f"## {section.title}", ""]
        table = [[name, *(shown(row[name]) for row in section.rows)] for name in section.rows[0]]
        lines += [_line(table[0]), _line(["---"] + ["---:"] * len(section.rows)), *map(_line, table[1:])]
        for note in section.notes:
            lines += ["", note]
    return "\n".join(lines) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def show(sections: Sequence[Section], about: Mapping[str, str], console: Console) -> None:
    """The same on a console."""
    console.print(" · ".join(f"{name}: {value}" for name, value in about.items()), highlight=False)
    for section in sections:
        table = Table(title=section.title, title_justify="left")
        first, *rest = section.rows[0]
        table.add_column(first)
        for row in section.rows:
            table.add_column(shown(row[first]), justify="right")
        for name in rest:
            table.add_row(name, *(shown(row[name]) for row in section.rows))
        console.print(table)
        for note in section.notes:
            console.print(note, highlight=False, markup=False)
