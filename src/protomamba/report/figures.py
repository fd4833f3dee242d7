"""The figures of a run and what differs between runs: for the page's first table and for `compare`."""

from __future__ import annotations

import statistics
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

from protomamba.report.record import RunRecord, Series
from protomamba.run_config import RunConfig

# Where a run lies and how it began says nothing about it.
NOT_COMPARED = frozenset({"out_dir", "resume", "progress"})

REASONS = {
    "done": "done",
    "early_stopping": "stopped early",
    "signal": "stopped by a signal",
    "failed": "failed",
}


def figures(record: RunRecord) -> dict[str, Any]:
    """What a run came to, by label in the order of reading; numbers as numbers. What was not measured is left out."""
    best = best_validation(record)
    found = {
        "status": status(record),
        "steps": record.last_step,
        "parameters": record.environment.get("parameters"),
        "train loss, last": _last(record, "train.loss"),
        **best,
        "tokens/s, median": _median(record, "train.tokens_per_s"),
        "working time, s": round(record.clock.values[-1], 1) if record.clock.values else None,
        "checkpoint, bytes": record.checkpoints[-1].get("bytes") if record.checkpoints else None,
        "save, ms": record.checkpoints[-1].get("save_ms") if record.checkpoints else None,
        "warnings": len(record.warnings),
    }
    return {label: value for label, value in found.items() if value is not None}


def status(record: RunRecord) -> str:
    """How the run ended, or that it has not."""
    if record.end is None:
        of = f" of {record.target_step:,}" if record.target_step else ""
        return f"no end written: running or killed, step {record.last_step:,}{of}"
    return REASONS.get(str(record.end.get("reason")), str(record.end.get("reason")))


def main_metric(record: RunRecord) -> str:
    """The curve that best checkpoints go by: cross entropy where it was logged, else the loss."""
    return "validation.val_nll" if "validation.val_nll" in record.series else "validation.val_loss"


def best_validation(record: RunRecord) -> dict[str, Any]:
    """The best validation: its step and all figures of that step; empty without a validation."""
    series = record.series.get(main_metric(record))
    if series is None:
        return {}
    step = series.steps[min(range(len(series.values)), key=series.values.__getitem__)]
    names = [name for name in record.series if name.startswith("validation.") and "majority" not in name]
    at = {label(name): value_at(record.series[name], step, exact=True) for name in names}
    return {"best validation, step": step, **{f"{name}, best": value for name, value in at.items()}}


def label(name: str) -> str:
    """A curve's name for people: "validation.val_nll" -> "val_nll"."""
    return name.partition(".")[2]


def value_at(series: Series, step: int, *, exact: bool = False) -> float | None:
    """The newest value up to a step; exact: only one of that very step."""
    index = bisect_right(series.steps, step) - 1
    if index < 0 or (exact and series.steps[index] != step):
        return None
    return series.values[index]


def at_equal(records: Sequence[RunRecord]) -> dict[str, list[float | None]]:
    """The judging curve of several runs at the last step, and the last second, that all have reached."""
    curves = [record.series.get(main_metric(record)) for record in records]
    if len(records) < 2 or not all(curves) or len({main_metric(record) for record in records}) > 1:
        return {}
    known = [curve for curve in curves if curve is not None]
    step = min(curve.steps[-1] for curve in known)
    seconds = min(record.clock.values[-1] for record in records)
    reached = [_step_after(record, seconds) for record in records]
    name = label(main_metric(records[0]))
    return {
        f"{name} at step {step:,}": [value_at(curve, step) for curve in known],
        f"{name} after {seconds:,.0f} s": [value_at(c, at) for c, at in zip(known, reached, strict=True)],
    }


def _step_after(record: RunRecord, seconds: float) -> int:
    index = bisect_right(record.clock.values, seconds) - 1
    return record.clock.steps[max(index, 0)]


def _last(record: RunRecord, name: str) -> float | None:
    series = record.series.get(name)
    return series.values[-1] if series else None


def _median(record: RunRecord, name: str) -> float | None:
    series = record.series.get(name)
    return round(statistics.median(series.values), 1) if series else None


def differences(records: Sequence[RunRecord], what: str = "config") -> dict[str, list[Any]]:
    """The settings (what: "config" or "environment") in which runs differ, with each run's value; "-" for absent."""
    tables: list[Mapping[str, Any]] = [getattr(record, what) for record in records]
    names = dict.fromkeys(name for table in tables for name in table if name not in NOT_COMPARED)
    rows = {name: [table.get(name, "-") for table in tables] for name in names}
    return {name: values for name, values in rows.items() if any(value != values[0] for value in values)}


def changed(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that are not the defaults of this version."""
    fields = RunConfig.model_fields
    return {name: value for name, value in config.items() if name not in fields or value != _default(name)}


def _default(name: str) -> Any:
    """As it stands in config.json."""
    value = RunConfig.default(name)
    if isinstance(value, tuple):
        return list(value)
    return value if isinstance(value, bool | int | float | str | None) else str(value)
