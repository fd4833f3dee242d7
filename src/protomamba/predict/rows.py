"""The input of `predict`, a row at a time: text, lines of tokens, JSON lines, CSV, parquet, arrays, FASTA.

A row that cannot be read comes as one with an error: whether to stop or to skip it is the caller's choice.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from protomamba.data.arrays import load_npy
from protomamba.data.compressed import BOM, columnar_errors, import_pyarrow, lines_of, plain_suffix
from protomamba.data.csv_tables import HEADER_AGAIN, csv_header
from protomamba.data.fasta import parts_of
from protomamba.data.files import json_reason
from protomamba.errors import UserError

# The one column of a format that has no names.
LINE = "line"
PARQUET_ROWS = 1_024
UNCLOSED = 'a quote (") that is never closed, so all rows behind it are part of this one'
FASTA_KEY, FASTA_BASES = "id", "sequence"
csv.field_size_limit(1 << 30)  # a sequence is one field


@dataclass(frozen=True)
class Row:
    """`fields` by column; `number` from 1, as editors count lines (jsonl, txt) and as tables count rows."""

    number: int
    fields: dict[str, Any] = field(default_factory=dict)
    error: str | None = None


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file, by the end of its name (.gz and .zst undone). UserError where it cannot be read at all."""
    kind = plain_suffix(path)
    if kind not in READERS:
        raise UserError(f"{path}: expected a name ending in {', '.join(READERS)} (or one of them and .gz, .zst)")
    try:
        yield from READERS[kind](path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror or error}") from error


def _text(path: Path) -> Iterator[str]:
    """The lines; bytes that are not UTF-8 become surrogates, which byte models give back as they were."""
    for number, raw in lines_of(path):
        line = raw.removeprefix(BOM if number == 1 else b"").decode("utf-8", "surrogateescape")
        if "\r" in line:  # alone it ends a line too
            yield from io.StringIO(line, newline="")
        else:
            yield line


def _lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path), 1):
        yield Row(number, {LINE: line.rstrip("\r\n")})


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line in enumerate(_text(path), 1):
        if line.strip():
            yield _json_row(number, line)


def _json_row(number: int, line: str) -> Row:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        return Row(number, error=f"expected a JSON object: {json_reason(error)}")
    if isinstance(value, list):
        return Row(number, {LINE: value})
    if not isinstance(value, dict):
        return Row(number, error=f"expected a JSON object or a list, found {line.strip()[:40]}")
    return Row(number, value)


def _csv(path: Path) -> Iterator[Row]:
    lines = _text(path)
    names, between = csv_header(path, next(lines, "").encode("utf-8", "surrogateescape"))
    reader = csv.DictReader(lines, names, strict=True, delimiter=between)
    number = 1
    while True:
        try:
            fields = next(reader, None)
        except csv.Error as error:
            lost = f"{error}" if "end of data" not in str(error) else UNCLOSED
            yield Row(number, error=f"not a row of CSV: {lost}")
            number += 1
            continue
        if fields is None:
            return
        yield _csv_row(number, fields, len(reader.fieldnames or ()))
        number += 1


def _csv_row(number: int, fields: dict[Any, Any], columns: int) -> Row:
    if None in fields or None in fields.values():
        count = sum(value is not None for name, value in fields.items() if name is not None)
        found = count + len(fields.get(None) or ())
        return Row(number, error=f"expected {columns} fields, found {found}")
    if len(fields) > 1 and all(name == value for name, value in fields.items()):
        return Row(number, error=HEADER_AGAIN)
    return Row(number, fields)


def _fasta(path: Path) -> Iterator[Row]:
    """A record a row: its id, and its bases as bytes, which a record of a whole chromosome needs."""
    record, name, pieces = -1, "", list[bytes]()
    for part in parts_of(path):
        if part.record != record and record >= 0:
            yield Row(record + 1, {FASTA_KEY: name, FASTA_BASES: b"".join(pieces)})
        if part.record != record:
            record, name, pieces = part.record, part.name, []
        pieces.append(part.data)
    if record >= 0:
        yield Row(record + 1, {FASTA_KEY: name, FASTA_BASES: b"".join(pieces)})


def _parquet(path: Path) -> Iterator[Row]:
    import_pyarrow(path)
    from pyarrow.parquet import ParquetFile

    number = 0
    with columnar_errors(path), ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=PARQUET_ROWS):
            for fields in batch.to_pylist():
                number += 1
                yield Row(number, fields)


def _array(path: Path) -> Iterator[Row]:
    rows = load_npy(path, mmap=True)
    if rows.ndim < 2:
        raise UserError(f"{path}: expected a row for each sequence (2 or 3 dimensions), found {rows.ndim}")
    for number in range(len(rows)):
        yield Row(number + 1, {LINE: np.array(rows[number])})


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".txt": _lines,
    **dict.fromkeys((".jsonl", ".ndjson"), _json_lines),
    **dict.fromkeys((".csv", ".tsv", ".inter", ".dat"), _csv),
    ".parquet": _parquet,
    ".npy": _array,
    **dict.fromkeys((".fa", ".fasta", ".fna"), _fasta),
}
