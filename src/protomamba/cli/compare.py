"""`protomamba compare`: runs side by side in a terminal."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protomamba.cli.flags import Parser
from protomamba.errors import ConfigError
from protomamba.report.figures import at_equal, differences, figures
from protomamba.report.markup import is_number, labelled, setting
from protomamba.report.record import RunRecord, read_runs


def configure(parser: Parser) -> None:
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="run folders, two or more")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def work(arguments: argparse.Namespace) -> int:
    """Print figures, then the settings and the machine's facts that differ."""
    from protomamba.train.callbacks.console import Console

    if len(arguments.runs) < 2:
        raise ConfigError(f"compare: expected two runs or more, got {len(arguments.runs)}")
    records = read_runs(arguments.runs)
    if arguments.json:
        print(json.dumps(_document(records)))
        return 0
    console, names = Console(), [record.name for record in records]
    console.table(("", *names, *(["change"] if len(names) == 2 else [])), _rows(records))
    for what, title in (("config", "settings that differ"), ("environment", "machine and versions that differ")):
        rows = differences(records, what)
        if rows:
            console.table((title, *names), [(name, *map(setting, values)) for name, values in rows.items()])
        elif what == "config":
            console.line("the settings are the same")
    return 0


def _document(records: Sequence[RunRecord]) -> dict[str, Any]:
    return {
        "runs": {record.name: figures(record) for record in records},
        "at_equal": at_equal(records),
        "config": differences(records),
        "environment": differences(records, "environment"),
    }


def _rows(records: Sequence[RunRecord]) -> list[tuple[str, ...]]:
    found = [figures(record) for record in records]
    labels = dict.fromkeys(label for one in found for label in one)
    rows = {label: [one.get(label) for one in found] for label in labels} | at_equal(records)
    return [(label, *(labelled(label, value) for value in values), *_change(values)) for label, values in rows.items()]


def _change(values: Sequence[Any]) -> list[str]:
    """For two runs: by how much the second differs, in percent of the first."""
    if len(values) != 2:
        return []
    first, second = values
    if not (is_number(first) and is_number(second) and first):
        return [""]
    return [f"{100 * (second - first) / abs(first):+.1f} %" if second != first else "same"]
