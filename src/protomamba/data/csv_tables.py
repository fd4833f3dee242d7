"""CSV files as blocks of rows, by pyarrow's parser: whole lines of about 16 MB at a time."""

from __future__ import annotations

import csv
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from protomamba.data.blocks import Array, BadRowError, Block, OnBad, refuse_missing
from protomamba.data.compressed import LONGEST_LINE, import_pyarrow, open_bytes, refuse_long_line
from protomamba.errors import UserError

BLOCK_BYTES = 1 << 24
HEADER_AGAIN = "expected values, found the names of the columns once more: were files with a header each joined?"


def csv_blocks(path: Path, columns: Sequence[str], on_bad: OnBad) -> Iterator[Block]:
    """The named columns as text. pyarrow's own streaming reads ahead in a thread that outlives an error."""
    import_pyarrow(path)
    with open_bytes(path) as file:
        names, delimiter = csv_header(path, file.readline(LONGEST_LINE))
        for column in columns:
            if column not in names:
                refuse_missing(path, column, names, taken=columns)
        parser = _Parser(path, names, delimiter, columns, on_bad)
        row = 1
        for lines in _whole_lines(path, file):
            for part, closed in _closed(lines, delimiter):
                if not closed:
                    parser.leave_out(row, 'expected a closing quote ("), found none up to the end of the file')
                    row += 1
                    continue
                block, total = parser.block(part, row)
                if len(block):
                    yield block
                row += total


@dataclass
class _Parser:
    """Whole lines -> a block of the rows that can be read; the others go to `on_bad`, or the first is raised."""

    path: Path
    names: Sequence[str]
    delimiter: str
    columns: Sequence[str]
    on_bad: OnBad

    def leave_out(self, row: int, wrong: str, column: str | None = None) -> None:
        """Row `row` of the file cannot be read."""
        error = BadRowError(self.path, row, wrong, column)
        if self.on_bad is None:
            raise error
        self.on_bad(error)

    def block(self, lines: bytes, first: int) -> tuple[Block, int]:
        """The rows of `lines`, the first of which is row `first` of the file, and how many rows they are in all."""
        wrong_fields: list[int] = []
        table = self._parsed(lines, first, wrong_fields)
        total = table.num_rows + len(wrong_fields)
        rows = np.delete(np.arange(first, first + total), wrong_fields)
        arrays = {name: table[name].combine_chunks() for name in self.columns}
        good = np.ones(len(rows), dtype=bool)
        for name, array in arrays.items():
            arrays[name] = self._text(array, name, rows, good)
        for place in _headers(arrays):
            good[place] = False
            self.leave_out(int(rows[place]), HEADER_AGAIN)
        if not good.all():
            arrays = {name: array.filter(_mask(good)) for name, array in arrays.items()}
        return Block(self.path, first, arrays, None if len(rows) == total and good.all() else rows[good]), total

    def _parsed(self, lines: bytes, first: int, left_out: list[int]) -> Any:
        """The columns as bytes: what is no text is found by `_text`, with its row and column."""
        import pyarrow
        import pyarrow.csv as arrow_csv

        read = arrow_csv.ReadOptions(column_names=self.names, use_threads=False)
        convert = arrow_csv.ConvertOptions(
            include_columns=list(self.columns), column_types=dict.fromkeys(self.names, pyarrow.binary())
        )
        parse = arrow_csv.ParseOptions(
            delimiter=self.delimiter,
            newlines_in_values=b'"' in lines,
            invalid_row_handler=self._skipping(first, left_out) if self.on_bad else None,
        )
        try:
            return arrow_csv.read_csv(pyarrow.BufferReader(lines), read, parse, convert)
        except pyarrow.ArrowInvalid as error:
            _refuse_csv(self.path, first, str(error))

    def _skipping(self, first: int, places: list[int]) -> Callable[[Any], str]:
        """Tells pyarrow to leave out a line of other fields than the header's, and us which it was."""

        def skip(row: Any) -> str:
            places.append(row.number - 1)
            wrong = f"expected {row.expected_columns} fields, found {row.actual_columns}"
            self.leave_out(first + row.number - 1, wrong)
            return "skip"

        return skip

    def _text(self, array: Array, column: str, rows: Any, good: Any) -> Array:
        """Bytes as text; `good` is False then for rows where they are none."""
        import pyarrow

        try:
            return array.cast(pyarrow.string())
        except pyarrow.ArrowInvalid:
            values = array.to_pylist()
        for place, value in enumerate(values):
            if good[place] and (wrong := not_utf8(value)):
                good[place] = False
                self.leave_out(int(rows[place]), wrong, column)
        return pyarrow.array([value.decode("utf-8", "replace") for value in values], pyarrow.string())


def _mask(good: Any) -> Array:
    import pyarrow

    return pyarrow.array(good)


def not_utf8(value: bytes) -> str:
    """What is wrong with bytes that should be UTF-8 text; empty if nothing is."""
    try:
        value.decode("utf-8")
    except UnicodeDecodeError as error:
        return (
            f"expected UTF-8 text, found byte 0x{value[error.start]:02x} in {value.decode('utf-8', 'replace')[:40]!r}"
        )
    return ""


def _headers(arrays: dict[str, Array]) -> list[int]:
    """The places of rows that are the header once more; a single column may well have its own name as a value."""
    import pyarrow.compute as pc

    if len(arrays) < 2:
        return []
    same = functools.reduce(pc.and_, (pc.equal(array, name) for name, array in arrays.items()))
    return [int(place) for place in np.flatnonzero(np.asarray(same))]


def csv_header(path: Path, line: bytes) -> tuple[list[str], str]:
    """Column names and the delimiter, from the first line. UserError unless it is UTF-8 and names, each another."""
    try:
        text = line.decode("utf-8-sig")
    except UnicodeDecodeError:
        kind = "UTF-16" if line[:2] in (b"\xff\xfe", b"\xfe\xff") else "another encoding"
        raise UserError(f"{path}, line 1: expected a header of UTF-8 text, found {kind}; save it as UTF-8") from None
    # The commonest of those in use, the comma where none occurs.
    delimiter = max(",;\t|", key=text.count)
    return _header_names(path, text, delimiter), delimiter


def _header_names(path: Path, header: str, delimiter: str) -> list[str]:
    lines = header.rstrip("\r\n")
    if "\r" in lines:
        raise UserError(f"{path}, line 1: expected lines that end with LF or CR LF, found CR alone; convert the file")
    try:
        names = [name.strip() for name in next(csv.reader([lines], delimiter=delimiter), [])]
    except csv.Error as error:
        raise UserError(f"{path}, line 1: expected the names of the columns: {error}") from None
    if not any(names):
        raise UserError(f"{path}, line 1: expected the names of the columns, found nothing")
    double = next((name for name in names if names.count(name) > 1), None)
    if double is not None:
        raise UserError(f"{path}, line 1: expected different names of columns, found {double!r} twice")
    return names


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


def _closed(lines: bytes, delimiter: str) -> Iterator[tuple[bytes, bool]]:
    """`lines` without those at which a value in quotes begins that never ends: (lines, True) and (such a line, False).

    pyarrow would take all that follows as that value, and say nothing.
    """
    while lines.strip():
        cut = _never_closed(lines, delimiter) if lines.count(b'"') % 2 else None
        if cut is None:
            yield lines, True
            return
        if lines[:cut].strip():
            yield lines[:cut], True
        line, _, lines = lines[cut:].partition(b"\n")
        yield line, False


def _never_closed(lines: bytes, delimiter: str) -> int | None:
    """Where the row begins whose value in quotes the end cuts off; None if there is none: a quote may be an inch."""
    end, place, start = "\x1f", 0, 0
    texts = lines.decode("latin-1").split("\n")
    reader = csv.reader(chain((f"{text}\n" for text in texts), [end]), delimiter=delimiter)
    try:
        for fields in reader:
            if fields == [end]:
                return None
            place, start = start, reader.line_num
    except csv.Error:  # not ours to judge
        return None
    return sum(len(text) + 1 for text in texts[:place])


def _refuse_csv(path: Path, row: int, message: str) -> NoReturn:
    """pyarrow's message with our row, and without the text of the line behind it."""
    _, marker, rest = message.partition("Row #")
    number, _, what = rest.partition(": ")
    if marker and number.isdigit():
        where, shown = f"row {row + int(number) - 1:,}", what.splitlines()[0][:120]
    else:
        where, shown = f"row {row:,} or later", message.splitlines()[0][:120]
    raise UserError(f"{path}, {where}: not a readable line of CSV: {shown}")
