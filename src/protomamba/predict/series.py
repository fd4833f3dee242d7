"""Real-valued sequences as rows of `predict`: .ts, .npz and tables with a column a step, scaled as in training."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from protomamba.data.compressed import plain_suffix
from protomamba.data.series import Floats, read_npz, read_ts, trimmed
from protomamba.data.tables import expand_columns
from protomamba.predict.rows import LINE, Row

SERIES = (".ts", ".npz")


def is_series(path: Path) -> bool:
    """Whether the file is one of series: its labels, which it must have, are not looked at."""
    return plain_suffix(path) in SERIES


def series_rows(path: Path, recipe: Mapping[str, Any]) -> Iterator[Row]:
    """{LINE: float32 (L, C)} of each case, by its number. UserError naming what cannot be read."""
    if plain_suffix(path) == ".ts":
        cases = read_ts(path, any_label=True)
    else:
        cases = read_npz(path, next(iter(recipe.get("values") or ()), None), recipe.get("label"))
    for number, (_, _, values) in enumerate(cases, 1):
        yield Row(number, {LINE: scaled(values, recipe)})


def wide_rows(rows: Iterable[Row], path: Path, patterns: Sequence[str], recipe: Mapping[str, Any]) -> Iterator[Row]:
    """A column a step: {LINE: float32 (L, 1)} beside the other columns. An empty cell is a missing value."""
    names = expand_columns(path, patterns, "--values")
    for row in rows:
        yield row if row.error else _wide_row(row, names, recipe)


def _wide_row(row: Row, names: Sequence[str], recipe: Mapping[str, Any]) -> Row:
    try:
        values = np.array([_number(row.fields[name]) for name in names], dtype=np.float32)
    except (KeyError, ValueError, TypeError, OverflowError):
        wrong = next(name for name in names if not _is_number(row.fields.get(name, "no such column")))
        return Row(row.number, error=f"column {wrong!r}: expected a number, found {str(row.fields.get(wrong))[:40]!r}")
    others = {name: value for name, value in row.fields.items() if name not in set(names)}
    return Row(row.number, {**others, LINE: scaled(trimmed(values[:, None]), recipe)})


def _number(value: Any) -> float:
    number = math.nan if value in ("", "?", None) else float(value)
    if math.isinf(number):
        raise ValueError
    return number


def _is_number(value: Any) -> bool:
    try:
        _number(value)
    except (ValueError, TypeError, OverflowError):
        return False
    return True


def scaled(values: Floats, recipe: Mapping[str, Any]) -> Floats:
    """Channel by channel by the mean and deviation of the training part."""
    mean, std = np.array(recipe["mean"]), np.array(recipe["std"])
    if values.shape[1:] != mean.shape:
        return values  # another number of channels: the row's own error says so
    found: Floats = ((values - mean) / std).astype(np.float32)
    return found
