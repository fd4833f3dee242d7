"""The output of `predict`: a line a sequence, appended; a job that goes on continues at the first missing line.

jsonl and csv are written in place: what a kill leaves torn is cut off. parquet has its index at the end: its lines are
gathered in a jsonl file beside it, OUT.part.jsonl, and become the table when all are there.
"""

from __future__ import annotations

import csv
import fcntl
import io
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from protomamba.errors import ConfigError, UserError
from protomamba.storage import atomic_path

Encode = Callable[[Mapping[str, Any]], bytes]
PARQUET_ROWS = 1_024


def encode_json(fields: Mapping[str, Any]) -> bytes:
    """Any name is written so that it reads back the same, also one that is not valid Unicode."""
    try:
        return json.dumps(fields, ensure_ascii=False, default=str).encode() + b"\n"
    except UnicodeEncodeError:
        return json.dumps(fields, default=str).encode() + b"\n"


def encode_csv(fields: Mapping[str, Any]) -> bytes:
    """Lists with spaces between, probabilities in columns of their own. UserError for a line break in a name."""
    cells = [_cell(value) for value in flat(fields).values()]
    if any("\n" in cell or "\r" in cell for cell in cells):
        raise UserError("a line break in a cell cannot be continued after: --out with a name ending in .jsonl")
    return _csv_line(cells)


def csv_header(fields: Mapping[str, Any]) -> bytes:
    return _csv_line(list(flat(fields)))


def _csv_line(cells: Sequence[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue().encode("utf-8", "backslashreplace")


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping inside as columns: probabilities {"a": 0.5} -> probability_a."""
    columns: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, Mapping):
            columns |= {f"{name.removesuffix('ies')}y_{key}": item for key, item in value.items()}
        else:
            columns[name] = value
    return columns


def _cell(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


class Lines:
    """The lines of one output file: those that are there, and the place to append. One writer at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file: IO[bytes] = open(path, "a+b")  # noqa: SIM115 (closed by __exit__)
        except OSError as error:
            raise UserError(f"--out {path}: cannot be written: {error.strerror}") from error
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            self._file.close()
            raise UserError(f"--out {path}: another process is writing it") from None
        self.count = self._cut_torn_end()
        self._file.seek(0)

    def _cut_torn_end(self) -> int:
        """How many whole lines there are; what is behind the last newline goes."""
        self._file.seek(0)
        count = end = 0
        for line in self._file:
            if line.endswith(b"\n"):
                count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def next(self) -> bytes | None:
        """The next of the lines that were there; None behind the last."""
        return self._file.readline() or None

    def append(self, lines: Sequence[bytes]) -> None:
        """Behind the last. UserError for a full disk; a part that did get written is cut off by the next job."""
        try:
            self._file.seek(0, os.SEEK_END)
            self._file.write(b"".join(lines))
            self._file.flush()
        except OSError as error:
            raise UserError(
                f"--out {self.path}: {error.strerror}; run the same command again to continue from there"
            ) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            os.fsync(self._file.fileno())
        self._file.close()


def lines_path(out: Path) -> Path:
    """Where lines are gathered. ConfigError for a format we do not write; UserError for a table that is complete."""
    if out.suffix in (".jsonl", ".csv"):
        return out
    if out.suffix != ".parquet":
        raise ConfigError(f"--out {out}: expected a name ending in .jsonl, .csv or .parquet")
    if out.exists():
        raise UserError(f"--out {out}: already exists and is complete; remove it, or choose another name")
    import_parquet(out)
    return out.with_name(out.name + ".part.jsonl")


def write_parquet(lines: Path, out: Path) -> None:
    """The table of gathered lines; they are removed once it is in place. UserError without pyarrow."""
    pyarrow, parquet = import_parquet(out)
    schema = None
    with atomic_path(out) as temporary:
        writer = None
        for rows in _pieces(lines):
            table = pyarrow.Table.from_pylist(rows, schema=schema)
            schema = table.schema
            writer = writer or parquet.ParquetWriter(temporary, schema)
            writer.write_table(table)
        if writer is None:
            parquet.write_table(pyarrow.table({}), temporary)
        else:
            writer.close()
    lines.unlink()


def import_parquet(out: Path) -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise UserError(f"--out {out}: needs pyarrow ({error}): pip install 'protomamba[parquet]'") from error
    return pyarrow, pyarrow.parquet


def _pieces(lines: Path) -> Iterator[list[dict[str, Any]]]:
    piece: list[dict[str, Any]] = []
    with open(lines, encoding="utf-8") as file:
        for line in file:
            piece.append({name: _unicode(value) for name, value in flat(json.loads(line)).items()})
            if len(piece) == PARQUET_ROWS:
                yield piece
                piece = []
    if piece:
        yield piece


def _unicode(value: Any) -> Any:
    """Parquet's text is valid Unicode; what is not is shown as in Python's escapes."""
    return value.encode("utf-8", "backslashreplace").decode() if isinstance(value, str) else value
