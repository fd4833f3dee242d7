"""Files: reading, the checksum that identifies contents, and operating-system errors in plain words."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from protomamba.errors import ConfigError, UserError

CHUNK_BYTES = 1 << 20
# A character that no text has: half a pair, or a byte that was no UTF-8 and was read so.
SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class FileRef:
    """One file as it was when it was examined: where, how long, when changed, and the checksum of its contents.

    Of two times `ctime_ns` is the one that no program can set back, `mtime_ns` the one that other systems also keep.
    """

    path: Path
    size: int
    mtime_ns: int
    ctime_ns: int
    sha256: str

    @classmethod
    def of(cls, path: Path, status: os.stat_result, sha256: str) -> FileRef:
        """A file with this status and these contents."""
        return cls(path, status.st_size, status.st_mtime_ns, status.st_ctime_ns, sha256)

    def same_stamp(self, status: os.stat_result) -> bool:
        """Whether size and times are the recorded ones (contents are then taken as unchanged)."""
        return (status.st_size, status.st_mtime_ns, status.st_ctime_ns) == (self.size, self.mtime_ns, self.ctime_ns)


def os_message(error: OSError) -> str:
    """The operating system's reason alone, without Python's prefix."""
    return error.strerror or str(error)


def check_regular_file(path: Path) -> os.stat_result:
    """The status of `path`; a UserError if it is missing, a folder or not a regular file."""
    try:
        status = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}; expected a file") from error
    if path.is_dir():
        raise UserError(f"{path}: expected a token file, found a folder; use --token-dir for a folder of shards")
    if not path.is_file():
        raise UserError(f"{path}: expected a regular file, found a device, pipe or socket")
    return status


def chunks_of(path: Path, offset: int = 0, size: int = CHUNK_BYTES) -> Iterator[bytes]:
    """The bytes of a file from `offset` in blocks of `size`; operating-system errors become UserErrors."""
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(offset)
            while block := file.read(size):
                yield block
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}") from error


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's contents, in hex: what `sha256sum` prints."""
    digest = hashlib.sha256()
    for block in chunks_of(path):
        digest.update(block)
    return digest.hexdigest()


def reference(path: Path) -> FileRef:
    """Examine a file now. The status is taken before the contents, so a later change cannot hide behind it."""
    status = check_regular_file(path)
    return FileRef.of(path, status, sha256_of(path))


def check_kinds(entry: Any) -> None:
    """TypeError unless the fields of a dataclass that are int or str hold that: a file that was edited may say else."""
    for field in fields(entry):
        value = getattr(entry, field.name)
        if field.type in ("int", "str") and type(value).__name__ != field.type:
            raise TypeError(f"{field.name}: expected {field.type}, found {str(value)[:40]}")


def refuse_repeated(paths: Sequence[Path]) -> None:
    """ConfigError for a file that is given twice, whose contents would count twice."""
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:
            raise ConfigError(f"{path}: is given twice; name each file once")
        seen.add(path.resolve())


def json_reason(error: Exception) -> str:
    """What is wrong with one line of JSON, without the line number that the parser gives it."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} at character {error.pos + 1:,}"
    if isinstance(error, UnicodeDecodeError):
        return f"byte 0x{error.object[error.start]:02x} at {error.start + 1:,} is not UTF-8"
    return str(error)


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; a UserError naming file and line if it is not one."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {error.lineno}: expected JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # bytes that are no text, a number of 5,000 digits, 1,000 brackets
        raise UserError(f"{path}: expected JSON text: {error}") from error
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value
