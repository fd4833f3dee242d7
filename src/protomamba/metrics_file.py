"""A line of metrics.jsonl: one JSON object, `event` first, `time` (seconds since 1970) last.

NaN and infinity are written as null, and named beside it: {"loss": null, "non_finite": {"loss": "nan"}}.
`read_metrics` puts them back. train/callbacks/metrics.py writes the file, docs/report.md lists the events.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from protomamba.errors import MALFORMED, UserError

# Figures of a line that are no curve: counters, flags, and what another curve already shows.
NO_CURVE = frozenset({"event", "step", "time", "epoch", "tokens", "targets", "step_ms", "best", "val_perplexity"})


def parse_line(line: bytes) -> dict[str, Any] | None:
    """The event of a whole line; None for one without its newline or that is not a JSON object."""
    if not line.endswith(b"\n"):
        return None
    try:
        event = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return event if isinstance(event, dict) else None


def encode_line(fields: Mapping[str, Any]) -> bytes:
    """One line of the file; scalars of torch and numpy become numbers, paths text, non-finite numbers null."""
    non_finite: dict[str, str] = {}
    content = {key: _plain(value, key, non_finite) for key, value in fields.items()}
    if non_finite:
        content["non_finite"] = non_finite
    return json.dumps(content, separators=(", ", ": "), allow_nan=False).encode() + b"\n"


def _plain(value: Any, place: str, non_finite: dict[str, str]) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item, f"{place}.{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, f"{place}.{i}", non_finite) for i, item in enumerate(value)]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        non_finite[place] = repr(value)
        return None
    return str(value) if isinstance(value, os.PathLike) else value


def read_metrics(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """The events of a run in order, non-finite numbers put back; a torn last line, of a run being written, is left out.

    UserError naming file and line where anything before the last line is not a JSON object, or if it cannot be read.
    """
    path = Path(path)
    try:
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                event = parse_line(line)
                if event is not None:
                    yield _restored(event, path, number)
                elif line.endswith(b"\n"):
                    raise UserError(f"{path}: line {number}: not a JSON object: the file was damaged or edited")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error


def _restored(event: dict[str, Any], path: Path, number: int) -> dict[str, Any]:
    try:
        return dict(_with_non_finite(event, "", event.pop("non_finite", {})))
    except MALFORMED as error:
        raise UserError(f"{path}: line {number}: its non-finite numbers are not as written: {error}") from error


def _with_non_finite(value: Any, place: str, non_finite: Mapping[str, str]) -> Any:
    if isinstance(value, dict):
        prefix = f"{place}." if place else ""
        return {key: _with_non_finite(item, f"{prefix}{key}", non_finite) for key, item in value.items()}
    if isinstance(value, list):
        return [_with_non_finite(item, f"{place}.{i}", non_finite) for i, item in enumerate(value)]
    return float(non_finite[place]) if value is None and place in non_finite else value


def curve_values(event: Mapping[str, Any]) -> dict[str, float]:
    """The figures of a `train` or `validation` line that are points of curves, by name; NaN and infinity too."""
    return {
        name: float(value)
        for name, value in event.items()
        if name not in NO_CURVE and isinstance(value, int | float) and not isinstance(value, bool)
    }
