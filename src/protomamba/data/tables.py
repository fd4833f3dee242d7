"""Tables of rows, block by block: named columns of CSV, JSON lines and parquet, compressed or not.

Every block is a mapping from column to a pyarrow array; a CSV's values are text, so that this module and not a guess
from its first lines decides what they are. Rows count from 1, without a header. Needs pyarrow (the extra `events`).
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from protomamba.data.blocks import Array, BadRowError, Block, OnBad, refuse_missing
from protomamba.data.compressed import (
    LONGEST_LINE,
    columnar_errors,
    import_pyarrow,
    lines_of,
    open_bytes,
    plain_suffix,
)
from protomamba.data.csv_tables import csv_blocks, csv_header
from protomamba.data.files import SURROGATE, json_reason
from protomamba.errors import UserError

BLOCK_ROWS = 1 << 16
CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".inter", ".dat")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_blocks(path: Path, columns: Sequence[str], on_bad: OnBad = None) -> Iterator[Block]:
    """The named columns of a file, recognised by its suffix. UserError for a column that is not there."""
    kind = plain_suffix(path)
    if kind in JSON_SUFFIXES:
        return _json_blocks(path, columns, on_bad)
    if kind == ".parquet":
        return _parquet_blocks(path, columns)
    if kind in CSV_SUFFIXES:
        return csv_blocks(path, columns, on_bad)
    raise UserError(f"{path}: expected a table: .csv, .tsv, .jsonl or .parquet, or the first three as .gz or .zst")


def column_names(path: Path) -> list[str]:
    """All columns of a file, of JSON lines those of its first line."""
    kind = plain_suffix(path)
    if kind in JSON_SUFFIXES:
        for number, line in _numbered_lines(path):
            return list(_json_object(path, number, line))
        return []
    if kind == ".parquet":
        return list(_parquet_schema(path).names)
    with open_bytes(path) as file:
        return csv_header(path, file.readline(LONGEST_LINE))[0]


def expand_columns(path: Path, patterns: Sequence[str], flag: str) -> list[str]:
    """Columns by name or with * and ?, in the order of the file within each pattern. UserError where none fits."""
    names = column_names(path)
    found: list[str] = []
    for pattern in patterns:
        fitting = [pattern] if pattern in names else fnmatch.filter(names, pattern)
        if not fitting:
            refuse_missing(path, pattern, names, flag)
        found += [name for name in fitting if name not in found]
    return found


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in lines_of(path) if line.strip())


def _json_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRowError(path, number, f"expected a JSON object on each line: {json_reason(error)}") from error
    if not isinstance(value, dict):
        raise BadRowError(path, number, f"expected a JSON object, found {type(value).__name__}")
    return value


def _json_blocks(path: Path, columns: Sequence[str], on_bad: OnBad) -> Iterator[Block]:
    pyarrow = import_pyarrow(path)
    kinds: dict[str, type] = {}
    lines = _numbered_lines(path)
    while chunk := list(islice(lines, BLOCK_ROWS)):
        numbers, rows = list[int](), list[list[Any]]()
        for number, line in chunk:
            try:
                rows.append(_json_row(path, number, _json_object(path, number, line), columns, kinds))
                numbers.append(number)
            except BadRowError as error:
                if on_bad is None:
                    raise
                on_bad(error)
        if rows:
            values = zip(columns, zip(*rows, strict=True), strict=True)
            found = {column: _json_array(pyarrow, path, column, each, numbers) for column, each in values}
            yield Block(path, numbers[0], found, np.array(numbers))


def _json_row(
    path: Path, number: int, value: dict[str, Any], columns: Sequence[str], kinds: dict[str, type]
) -> list[Any]:
    """The columns' values, each of one kind throughout the file; what that kind is, the first row says."""
    missing = next((column for column in columns if column not in value), None)
    if missing is not None and not kinds:
        refuse_missing(path, missing, list(value), taken=columns)
    found = [value.get(column) for column in columns]
    for column, each in zip(columns, found, strict=True):
        if each is not None:
            _check_kind(path, number, column, each, kinds)
    kinds.setdefault("", dict)  # there was a row
    return found


def _check_kind(path: Path, number: int, column: str, value: Any, kinds: dict[str, type]) -> None:
    for each in value if isinstance(value, list) else [value]:
        kind = {float: int}.get(type(each), type(each))  # 1 and 1.5 are both numbers
        if each is not None and kinds.setdefault(column, kind) is not kind:
            words = {int: "a number", str: "text"}.get(kinds[column], kinds[column].__name__)
            wrong = f"expected {words} as in the rows before, found {repr(each)[:60]}"
            raise BadRowError(path, number, wrong, column)
    shape = list if isinstance(value, list) else object
    if kinds.setdefault(f"{column}[]", shape) is not shape:
        wrong = f"expected a list in every row or in none, found {repr(value)[:60]}"
        raise BadRowError(path, number, wrong, column)


def _json_array(pyarrow: Any, path: Path, column: str, values: Sequence[Any], numbers: Sequence[int]) -> Array:
    try:
        return pyarrow.array(values)
    except UnicodeEncodeError as error:
        wrong = "expected text, found half a surrogate pair"
        for number, value in zip(numbers, values, strict=True):
            if _is_broken(value):
                raise BadRowError(path, number, wrong, column) from None
        raise UserError(f"{path}, column {column!r}: {wrong}") from error
    except (pyarrow.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        raise UserError(f"{path}, column {column!r}: {' '.join(str(error).split())[:120]}") from error


def _is_broken(value: Any) -> bool:
    texts = value if isinstance(value, list) else [value]
    return any(isinstance(text, str) and SURROGATE.search(text) for text in texts)


def _parquet_schema(path: Path) -> Any:
    from pyarrow.parquet import read_schema

    with columnar_errors(path):
        return read_schema(path)


def _parquet_blocks(path: Path, columns: Sequence[str]) -> Iterator[Block]:
    import_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    names = column_names(path)
    for column in columns:
        if column not in names:
            refuse_missing(path, column, names, taken=columns)
    with columnar_errors(path), ParquetFile(path) as file:
        first = 1
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=list(columns)):
            yield Block(path, first, {name: batch.column(batch.schema.get_field_index(name)) for name in columns})
            first += batch.num_rows
