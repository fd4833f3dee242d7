"""Documents out of text, byte, JSON-lines, parquet and arrow files, in pieces of bounded size, always the same ones.

Text and JSON lines may be compressed (.gz, .zst). A folder that the `datasets` library saved is read as its arrow
files, without that library.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protomamba.data.compressed import BOM, blocks_of, columnar_errors, import_pyarrow, lines_of, plain_suffix
from protomamba.data.files import (
    CHUNK_BYTES,
    check_regular_file,
    chunks_of,
    json_reason,
    os_message,
    read_json,
    refuse_repeated,
)
from protomamba.errors import ConfigError, UserError

FORMATS = ("auto", "text", "bytes", "jsonl", "parquet", "arrow")
SUFFIX_FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".arrow": "arrow"}
# What the `datasets` library writes beside its arrow files, and above the folders of several splits.
DATASET_STATE, DATASET_SPLITS = "state.json", "dataset_dict.json"

# What a suffix looks like, and the kinds of `prepare` that take it.
_TABLE, _FASTA = ("a table", "events", "labels"), ("FASTA", "fasta")
OTHER_KINDS = {
    **dict.fromkeys((".csv", ".tsv"), _TABLE),
    **dict.fromkeys((".fa", ".fasta", ".fna", ".ffn"), _FASTA),
    **dict.fromkeys((".ts", ".npz"), ("labelled series", "labels")),
}


@dataclass(frozen=True)
class Source:
    """One input file: its name within what was given, and how it is read."""

    path: Path
    name: str
    format: str


@dataclass(frozen=True)
class Piece:
    """A part of a document, and whether it is the last. `read` is how many bytes of the file are done after it."""

    data: bytes
    ends: bool
    read: int


def find_sources(inputs: Sequence[Path], format: str) -> list[Source]:
    """The files of the inputs in a fixed order: as given, within folders by name; hidden files are left out.

    `auto` reads .jsonl, .ndjson, .parquet and .arrow by their suffix and all else as text; a table, FASTA or series
    named by itself is refused, because its text is hardly what was meant.
    """
    if format not in FORMATS:
        raise ConfigError(f"--format {format}: expected one of {', '.join(FORMATS)}")
    refuse_repeated(inputs)
    sources = []
    for given in inputs:
        for path, name in _files_in(given) if os.path.isdir(given) else [(given, given.name)]:
            if check_regular_file(path).st_size:  # an empty file has no document
                if format == "auto" and path == given:
                    _refuse_other_kinds(path)
                chosen = SUFFIX_FORMATS.get(plain_suffix(path), "text") if format == "auto" else format
                sources.append(Source(path, name, chosen))
    if not sources:
        raise UserError(f"{', '.join(map(str, inputs)) or 'no input'}: expected files or folders with text, found none")
    return sources


def _refuse_other_kinds(path: Path) -> None:
    """ConfigError for a file that is clearly not text, naming the kind it may be of."""
    kinds = OTHER_KINDS.get(plain_suffix(path))
    if kinds is not None:
        what, *names = kinds
        commands = " or ".join(f"`protomamba prepare {name} {path}`" for name in names)
        raise ConfigError(f"{path}: looks like {what}: use {commands}, or --format text to take it as plain text")


def _files_in(folder: Path) -> list[tuple[Path, str]]:
    """The files below a folder, through links too, in the order of their names. UserError where it cannot be walked.

    Of a folder of the `datasets` library only its arrow files, in its own order.
    """
    if (folder / DATASET_STATE).is_file():
        return _dataset_files(folder)
    if (folder / DATASET_SPLITS).is_file():
        splits = read_json(folder / DATASET_SPLITS).get("splits")
        names = ", ".join(str(folder / str(name)) for name in splits) if isinstance(splits, list) else "unknown"
        raise UserError(f"{folder}: a dataset of several splits: name the one to train on: {names}")
    found = [path.relative_to(folder) for path in _walk(folder)]
    return [(folder / path, path.as_posix()) for path in sorted(found, key=lambda path: path.as_posix())]


def _dataset_files(folder: Path) -> list[tuple[Path, str]]:
    listed = read_json(folder / DATASET_STATE).get("_data_files")
    try:
        names = [str(each["filename"]) for each in listed]  # type: ignore[union-attr]
    except (TypeError, KeyError) as error:
        raise UserError(f"{folder / DATASET_STATE}: expected a list of _data_files, each with a filename") from error
    return [(folder / name, name) for name in names]


def _walk(folder: Path) -> Iterator[Path]:
    """All that is no folder and not hidden. What cannot be looked at counts as a file, whose reading then says why."""
    waiting: list[tuple[Path, tuple[Path, ...]]] = [(folder, (folder.resolve(),))]
    while waiting:
        place, above = waiting.pop()
        for path in _entries(place):
            if not os.path.isdir(path):
                yield path
                continue
            home = path.resolve()
            if home in above:
                raise UserError(f"{path}: a link that leads back to {home}, where it lies; name the folders one by one")
            waiting.append((path, (*above, home)))


def _entries(folder: Path) -> list[Path]:
    try:
        with os.scandir(folder) as entries:
            return [Path(entry) for entry in entries if not entry.name.startswith(".")]
    except OSError as error:
        raise UserError(f"{folder}: the folder cannot be read: {os_message(error)}") from error


def pieces_of(source: Source, field: str) -> Iterator[Piece]:
    """The documents of a file in pieces of about a megabyte; `field` names the text in JSON lines and parquet.

    All but `bytes` is UTF-8 and checked to be; UserErrors name file and byte, line or row.
    """
    if source.format == "jsonl":
        return _jsonl(source.path, field)
    if source.format in ("parquet", "arrow"):
        return _columnar(source.path, source.format, field)
    return _whole_file(source.path, is_text=source.format == "text")


def _whole_file(path: Path, is_text: bool) -> Iterator[Piece]:
    """A file as one document, cut behind line ends so that a tokenizer sees whole lines."""
    size, done, pending = path.stat().st_size, 0, b""
    for number, block in enumerate(blocks_of(path) if is_text else chunks_of(path)):
        if is_text and number == 0 and block.startswith(BOM):
            done, block = len(BOM), block[len(BOM) :]
        if pending:  # and more follows: only the last piece ends where the file does
            cut = pending.rfind(b"\n") + 1 or _character_start(pending)
            yield Piece(_checked(path, done, pending[:cut], is_text), False, min(done + cut, size))
            done, pending = done + cut, pending[cut:]
        pending += block
    yield Piece(_checked(path, done, pending, is_text), True, min(done + len(pending), size))


def _character_start(data: bytes) -> int:
    """Where the last UTF-8 character of `data` starts, so that none is cut in two."""
    start = len(data) - 1
    while start > max(0, len(data) - 4) and data[start] & 0xC0 == 0x80:
        start -= 1
    return max(start, 1)


def _checked(path: Path, offset: int, data: bytes, is_text: bool) -> bytes:
    try:
        if is_text:
            data.decode("utf-8")
    except UnicodeDecodeError as error:
        place = offset + error.start
        raise UserError(
            f"{path}, line {_line_of(path, place):,}, byte {place:,}: expected UTF-8 text, found "
            f"0x{data[error.start]:02x}; convert the file, or read it with --format bytes"
        ) from error
    return data


def _line_of(path: Path, place: int) -> int:
    """The line, from 1, of a byte of the contents."""
    line = 1
    for block in blocks_of(path):
        line += block.count(b"\n", 0, max(0, place))
        place -= len(block)
    return line


def _jsonl(path: Path, field: str) -> Iterator[Piece]:
    size, done = path.stat().st_size, 0
    for number, line in lines_of(path):
        done += len(line)
        if line.strip():
            yield Piece(_json_text(f"{path}, line {number:,}", line, field), True, min(done, size))


def _json_text(where: str, line: bytes, field: str) -> bytes:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: expected a JSON object: {json_reason(error)}") from error
    if not isinstance(value, dict) or field not in value:
        found = f"keys {', '.join(sorted(value))[:100]}" if isinstance(value, dict) else type(value).__name__
        raise UserError(f"{where}: expected an object with {field!r}, found {found}; name the text's key with --field")
    return _as_utf8(where, field, value[field])


def _as_utf8(where: str, field: str, text: Any) -> bytes:
    if not isinstance(text, str):
        raise UserError(f"{where}: expected text in {field!r}, found {'nothing' if text is None else repr(text)[:40]}")
    try:
        return text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: the text in {field!r} has half a surrogate pair at {error.start}") from error


def _columnar(path: Path, format: str, field: str) -> Iterator[Piece]:
    size, row = path.stat().st_size, 0
    with columnar_errors(path, format):
        for texts, done in (_parquet if format == "parquet" else _arrow)(path, field):
            for text in texts:
                row += 1
                yield Piece(_as_utf8(f"{path}, row {row:,}", field, text), True, int(size * done))


def _parquet(path: Path, field: str) -> Iterator[tuple[list[Any], float]]:
    """The texts of some rows, and the share of the file that is read after them."""
    from pyarrow.parquet import ParquetFile

    with ParquetFile(path) as file:
        _require_column(path, field, file.schema_arrow.names)
        rows, done = max(1, file.metadata.num_rows), 0
        for batch in file.iter_batches(batch_size=256, columns=[field]):
            done += batch.num_rows
            yield batch.column(0).to_pylist(), done / rows


def _arrow(path: Path, field: str) -> Iterator[tuple[list[Any], float]]:
    pyarrow = import_pyarrow(path)
    size = max(1, path.stat().st_size)
    with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
        _require_column(path, field, reader.schema.names)
        for batch in reader:
            yield batch.column(batch.schema.get_field_index(field)).to_pylist(), file.tell() / size


def _require_column(path: Path, field: str, names: Sequence[str]) -> None:
    if field not in names:
        shown = ", ".join(names)[:100]
        raise UserError(f"{path}: expected a column {field!r}, found {shown}; name it with --field")


def grouped(pieces: Iterable[Piece], size: int = CHUNK_BYTES) -> Iterator[list[Piece]]:
    """Runs of pieces of at least `size` bytes, the unit of work. It depends on the pieces alone."""
    group: list[Piece] = []
    held = 0
    for piece in pieces:
        group.append(piece)
        held += len(piece.data)
        if held >= size:
            yield group
            group, held = [], 0
    if group:
        yield group
