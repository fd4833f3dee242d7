"""Tables of rows, block by block: named columns of CSV, JSON lines and parquet, compressed or not.

Every block is a mapping from column to a pyarrow array; a CSV's values are text, so that this module and not a guess
from its first lines decides what they are. Rows count from 1, without a header. Needs pyarrow (the extra `events`).
"""

from __future__ import annotations

import csv
import fnmatch
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from protomamba.data.compressed import (
    LONGEST_LINE,
    columnar_errors,
    import_pyarrow,
    lines_of,
    open_bytes,
    plain_suffix,
    refuse_long_line,
)
from protomamba.errors import UserError
from protomamba.schema import nearest

BLOCK_BYTES = 1 << 24
BLOCK_ROWS = 1 << 16
CSV_SUFFIXES = (".csv", ".tsv", ".txt", ".inter", ".dat")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
Array = Any  # a pyarrow array


class BadRowError(UserError):
    """One row that cannot be read: its number, and what is wrong with it."""

    def __init__(self, path: Path, row: int, wrong: str, column: str | None = None) -> None:
        place = "" if column is None else f"column {column!r}"
        super().__init__(f"{path}, row {row:,}{place and ', '}{place}: {wrong}")
        self.row, self.reason = row, f"{place}: {wrong}" if place else wrong


# Takes the rows that are left out; without one the first of them is raised.
OnBad = Callable[[BadRowError], None] | None


@dataclass(frozen=True)
class Block:
    """Rows `first` and following of a file (from 1), some of its columns.

    rows: the number of each, where they do not follow on each other.
    """

    path: Path
    first: int
    columns: dict[str, Array]
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def number(self, row: int) -> int:
        """The number in the file of a row (from 0) of this block."""
        return self.first + row if self.rows is None else int(self.rows[row])

    def part(self, start: int, stop: int) -> Block:
        """Some of its rows."""
        columns = {name: array[start:stop] for name, array in self.columns.items()}
        return Block(self.path, self.first + start, columns, None if self.rows is None else self.rows[start:stop])

    def refuse(self, row: int, column: str, expected: str, found: object) -> NoReturn:
        """BadRowError naming file, row (from 0 in this block) and column."""
        shown = "nothing" if found is None or found == "" else repr(found)[:60]
        raise BadRowError(self.path, self.number(row), f"expected {expected}, found {shown}", column)


def read_blocks(path: Path, columns: Sequence[str], on_bad: OnBad = None) -> Iterator[Block]:
    """The named columns of a file, recognised by its suffix. UserError for a column that is not there."""
    kind = plain_suffix(path)
    if kind in JSON_SUFFIXES:
        return _json_blocks(path, columns, on_bad)
    if kind == ".parquet":
        return _parquet_blocks(path, columns)
    if kind in CSV_SUFFIXES:
        return _csv_blocks(path, columns, on_bad)
    raise UserError(f"{path}: expected a table: .csv, .tsv, .jsonl or .parquet, or the first two as .gz or .zst")


def each_good(block: Block, work: Callable[[Block], None], on_bad: OnBad) -> None:
    """`work` on the rows that it does not refuse by BadRowError, in order; it must do nothing before it refuses."""
    try:
        work(block)
    except BadRowError as error:
        if on_bad is None:
            raise
        if len(block) == 1:
            return on_bad(error)
        half = len(block) // 2
        for part in (block.part(0, half), block.part(half, len(block))):
            each_good(part, work, on_bad)


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
        return _csv_header(path, file)[0]


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


def refuse_missing(path: Path, column: str, names: Sequence[str], flag: str = "") -> NoReturn:
    """UserError naming the columns there are."""
    shown = ", ".join(names)[:200] or "none"
    advice = f"; name it with {flag}" if flag else ""
    raise UserError(f"{path}: no column {column!r}{nearest(column, names)}: its columns are {shown}{advice}")


def _csv_blocks(path: Path, columns: Sequence[str], on_bad: OnBad) -> Iterator[Block]:
    """Whole lines of about 16 MB at a time: pyarrow's own streaming reads ahead in a thread that outlives an error."""
    pyarrow = import_pyarrow(path)
    import pyarrow.csv as arrow_csv

    with open_bytes(path) as file:
        names, delimiter = _csv_header(path, file)
        for column in columns:
            if column not in names:
                refuse_missing(path, column, names)
        read = arrow_csv.ReadOptions(column_names=names, use_threads=False)
        convert = arrow_csv.ConvertOptions(
            include_columns=list(columns), column_types={name: pyarrow.string() for name in names}
        )
        row = 1
        for lines in _whole_lines(path, file):
            left_out: list[int] = []
            skip = _left_out(path, row, left_out, on_bad) if on_bad else None
            parse = arrow_csv.ParseOptions(
                delimiter=delimiter, newlines_in_values=b'"' in lines, invalid_row_handler=skip
            )
            try:
                table = arrow_csv.read_csv(pyarrow.BufferReader(lines), read, parse, convert)
            except pyarrow.ArrowInvalid as error:
                _refuse_csv(path, row, str(error))
            total = table.num_rows + len(left_out)
            rows = np.delete(np.arange(row, row + total), left_out) if left_out else None
            if table.num_rows:
                yield Block(path, row, {name: table[name].combine_chunks() for name in columns}, rows)
            row += total


def _left_out(path: Path, first: int, places: list[int], on_bad: Callable[[BadRowError], None]) -> Callable[[Any], str]:
    """Tells pyarrow to leave out a line of other fields than the header's, and us which it was."""

    def skip(row: Any) -> str:
        places.append(row.number - 1)
        wrong = f"expected {row.expected_columns} fields, found {row.actual_columns}"
        on_bad(BadRowError(path, first + row.number - 1, wrong))
        return "skip"

    return skip


def _csv_header(path: Path, file: Any) -> tuple[list[str], str]:
    """Column names and the delimiter, from the first line."""
    try:
        line = file.readline(LONGEST_LINE).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, line 1: expected a header of UTF-8 text, found byte {error.start} is not") from None
    delimiter = delimiter_of(line)
    names = names_of(path, line, delimiter)
    if not any(names):
        raise UserError(f"{path}, line 1: expected the names of the columns, found nothing")
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f"{path}, line 1: expected different names of columns, found {double!r} twice")
    return names, delimiter


def names_of(path: Path, header: str, delimiter: str) -> list[str]:
    """The names of the columns in the first line of a CSV file. UserError where it is no line of CSV."""
    try:
        row = next(csv.reader([header.rstrip("\r\n")], delimiter=delimiter), [])
    except csv.Error as error:
        raise UserError(f"{path}, line 1: expected the names of the columns: {error}") from None
    return [name.strip() for name in row]


def delimiter_of(header: str) -> str:
    """What stands between the names of the columns: the commonest of those in use, the comma where none occurs."""
    return max(",;\t|", key=header.count)


def _whole_lines(path: Path, file: Any) -> Iterator[bytes]:
    """The rest of a file in blocks that end behind a line, and not inside a quoted value."""
    pending = b""
    while block := file.read(BLOCK_BYTES):
        pending += block
        if cut := _last_end(pending):
            yield pending[:cut]
            pending = pending[cut:]
        if len(pending) > LONGEST_LINE:
            refuse_long_line(str(path))
    if pending.strip():
        yield pending


def _last_end(text: bytes) -> int:
    """How much of `text` is whole lines: up to the last line end with an even number of quotes before it, or 0."""
    cut = text.rfind(b"\n") + 1
    odd = text.count(b'"', 0, cut) % 2
    while odd:
        earlier = text.rfind(b"\n", 0, text.rfind(b'"', 0, cut)) + 1
        odd = (odd - text.count(b'"', earlier, cut)) % 2
        cut = earlier
    return cut


def _refuse_csv(path: Path, row: int, message: str) -> NoReturn:
    """pyarrow's message with our row, and without the text of the line behind it."""
    _, marker, rest = message.partition("Row #")
    number, _, what = rest.partition(": ")
    if marker and number.isdigit():
        where, shown = f"row {row + int(number) - 1:,}", what.splitlines()[0][:120]
    else:
        where, shown = f"row {row:,} or later", message.splitlines()[0][:120]
    raise UserError(f"{path}, {where}: not a readable line of CSV: {shown}")


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    return ((number, line) for number, line in lines_of(path) if line.strip())


def _json_object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise BadRowError(path, number, f"expected a JSON object: {error}") from error
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
            found = {column: _json_array(pyarrow, path, column, each) for column, each in values}
            yield Block(path, numbers[0], found, np.array(numbers))


def _json_row(
    path: Path, number: int, value: dict[str, Any], columns: Sequence[str], kinds: dict[str, type]
) -> list[Any]:
    """The columns' values, each of one kind throughout the file; what that kind is, the first row says."""
    missing = next((column for column in columns if column not in value), None)
    if missing is not None and not kinds:
        refuse_missing(path, missing, list(value))
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


def _json_array(pyarrow: Any, path: Path, column: str, values: Sequence[Any]) -> Array:
    try:
        return pyarrow.array(values)
    except (pyarrow.ArrowException, TypeError, OverflowError, UnicodeError) as error:
        raise UserError(f"{path}, column {column!r}: {' '.join(str(error).split())[:120]}") from error


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
            refuse_missing(path, column, names)
    with columnar_errors(path), ParquetFile(path) as file:
        first = 1
        for batch in file.iter_batches(batch_size=BLOCK_ROWS, columns=list(columns)):
            yield Block(path, first, {name: batch.column(batch.schema.get_field_index(name)) for name in columns})
            first += batch.num_rows
