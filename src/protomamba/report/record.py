"""A run folder as it is read back: curves, tables, warnings, what the run said of itself. Nothing is computed."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protomamba.errors import MALFORMED, UserError
from protomamba.metrics_file import curve_values, read_metrics

# Of its start, and settings that config.json has; all else in a "run" line is the run's environment.
OF_THE_START = frozenset({"event", "step", "time", "resumed_from", "target_step", "seed", "precision"})


# No count, time or size of a run comes near: what is beyond it was not written by one.
LARGEST = 1e18


@dataclass
class Series:
    """One curve: values over strictly rising steps, all finite."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass
class RunRecord:
    """What one run folder holds. `series` by "event.figure", as "train.loss"; tables by their split, newest last."""

    folder: Path
    name: str
    config: dict[str, Any]
    starts: list[dict[str, Any]] = field(default_factory=list)
    series: dict[str, Series] = field(default_factory=dict)
    clock: Series = field(default_factory=Series)
    checkpoints: list[dict[str, Any]] = field(default_factory=list)
    classification: dict[str, dict[str, Any]] = field(default_factory=dict)
    ranking: dict[str, dict[str, Any]] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[tuple[int, str]] = field(default_factory=list)
    end: dict[str, Any] | None = None
    last_step: int = 0

    @property
    def environment(self) -> dict[str, Any]:
        """What the newest start said of machine, versions and model."""
        newest = self.starts[-1] if self.starts else {}
        return {key: value for key, value in newest.items() if key not in OF_THE_START}

    @property
    def target_step(self) -> int | None:
        return self.starts[-1].get("target_step") if self.starts else None


def read_runs(folders: Sequence[str | Path]) -> list[RunRecord]:
    """The runs of these folders, named by the shortest ends of their paths that tell them apart. Raises UserError."""
    paths = [Path(folder) for folder in folders]
    return [read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for length in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return [f"{path.name} ({number})" for number, path in enumerate(paths, 1)]  # the same folder twice


def read_run(folder: Path, name: str | None = None) -> RunRecord:
    """One run, also one that is being written. UserError if there is no metrics.jsonl or it is damaged."""
    metrics = folder / "metrics.jsonl"
    if not metrics.is_file():
        raise UserError(
            f"{folder}: expected the folder of a run, found no metrics.jsonl; give the --out-dir of a training run"
        )
    record = RunRecord(folder, name or folder.resolve().name, _read_config(folder / "config.json"))
    since: float | None = None
    for number, event in enumerate(read_metrics(metrics), 1):
        try:
            since = _advance_clock(record, event, since)
            _READERS.get(event["event"], _ignore)(record, event)
            record.last_step = max(record.last_step, _step(event))
        except MALFORMED as error:
            raise UserError(f"{metrics}: line {number}: no event of a run ({type(error).__name__}: {error})") from error
    return record


def _read_config(path: Path) -> dict[str, Any]:
    """The resolved configuration; empty where the folder has none. UserError if it is not JSON."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: expected the run's configuration as JSON: {error}") from None
    return flattened(config) if isinstance(config, dict) else {}


def flattened(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level, with dots in the names."""
    flat: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _advance_clock(record: RunRecord, event: dict[str, Any], since: float | None) -> float | None:
    """Seconds of work up to each step: pauses between a stop and a resume are not counted."""
    now = event.get("time")
    if not isinstance(now, int | float):
        return since
    _number(event, "time")
    worked = record.clock.values[-1] if record.clock.values else 0.0
    if since is not None and event["event"] != "run":
        worked += max(0.0, now - since)
    step = _step(event)
    if record.clock.steps and step <= record.clock.steps[-1]:
        record.clock.values[-1] = worked
    else:
        record.clock.steps.append(step)
        record.clock.values.append(worked)
    return float(now)


def _step(event: Mapping[str, Any]) -> int:
    return int(_number(event, "step")) if isinstance(event.get("step"), int) else 0


def _number(event: Mapping[str, Any], name: str) -> float:
    """A figure that everything behind can show and draw; 0 where there is none. ValueError for anything else."""
    value = event.get(name, 0)
    if not isinstance(value, int | float) or not abs(value) < LARGEST:
        raise ValueError(f"{name}: expected a number below {LARGEST:g}, found {str(value)[:40]}")
    return value


def _start(record: RunRecord, event: dict[str, Any]) -> None:
    record.starts.append(event)
    record.end = None
    if event.get("resumed_from"):
        record.warnings.append((_step(event), f"resumed from {event['resumed_from']}"))


def _train(record: RunRecord, event: dict[str, Any]) -> None:
    _curves(record, event)
    if event.get("skipped_update"):
        record.warnings.append((_step(event), "NaN or Inf: update skipped"))


def _curves(record: RunRecord, event: dict[str, Any]) -> None:
    for name, value in curve_values(event).items():
        if not math.isfinite(value):
            record.warnings.append((_step(event), f"{name} is {value}"))
            continue
        series = record.series.setdefault(f"{event['event']}.{name}", Series())
        if not series.steps or series.steps[-1] < _step(event):
            series.steps.append(_step(event))
            series.values.append(value)


def _checkpoint(record: RunRecord, event: dict[str, Any]) -> None:
    for name in ("bytes", "save_ms"):
        _number(event, name)
    record.checkpoints.append(event)


def _checkpoint_failed(record: RunRecord, event: dict[str, Any]) -> None:
    record.warnings.append((_step(event), f"checkpoint not saved: {event.get('error', '')}"))


def _warning(record: RunRecord, event: dict[str, Any]) -> None:
    record.warnings.append((_step(event), str(event.get("text", ""))))


def _classification(record: RunRecord, event: dict[str, Any]) -> None:
    _require(record, event, "classes", "confusion")
    count, rows = len(event["classes"]), event["confusion"]
    if len(rows) != count or any(len(row) != count for row in rows):
        raise UserError(f"{record.folder}: metrics.jsonl: classification: expected {count} x {count} counts")
    record.classification[event.get("split", "validation")] = event


def _ranking(record: RunRecord, event: dict[str, Any]) -> None:
    _require(record, event, "figures")
    record.ranking[event.get("split", "validation")] = event


def _sample(record: RunRecord, event: dict[str, Any]) -> None:
    _require(record, event, "text")
    record.samples.append(event)


def _require(record: RunRecord, event: Mapping[str, Any], *names: str) -> None:
    missing = [name for name in names if name not in event]
    if missing:
        raise UserError(
            f"{record.folder}: metrics.jsonl: event {event['event']} at step {_step(event)}: expected {missing[0]}"
        )


def _end(record: RunRecord, event: dict[str, Any]) -> None:
    record.end = event
    if event.get("error"):
        record.warnings.append((_step(event), f"failed: {event['error']}"))


def _ignore(record: RunRecord, event: dict[str, Any]) -> None:
    """An event of a later version: not ours to judge."""


_READERS = {
    "run": _start,
    "train": _train,
    "validation": _curves,
    "checkpoint": _checkpoint,
    "checkpoint_failed": _checkpoint_failed,
    "warning": _warning,
    "classification": _classification,
    "ranking": _ranking,
    "sample": _sample,
    "end": _end,
}


def all_of(records: Iterable[RunRecord], name: str) -> list[tuple[int, Series]]:
    """(number of the run, curve) for each run that has this curve."""
    return [(number, record.series[name]) for number, record in enumerate(records) if name in record.series]
