"""Files as they are, or compressed with gzip (.gz) or Zstandard (.zst): their bytes, and damage as one clear error."""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, NoReturn, cast

from protomamba.data.files import CHUNK_BYTES, check_regular_file, os_message
from protomamba.errors import UserError

SUFFIXES = (".gz", ".zst")
# A line is in memory at once, and a few kilobytes of gzip may unpack to one of any length.
LONGEST_LINE = 1 << 30
# What spreadsheets put before UTF-8 text. It is no part of it.
BOM = b"\xef\xbb\xbf"


def plain_suffix(path: Path) -> str:
    """The suffix of the contents, in lower case: `.csv` of `events.csv.gz`."""
    inner = Path(path.stem) if path.suffix.lower() in SUFFIXES else path
    return inner.suffix.lower()


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in SUFFIXES


def open_bytes(path: Path) -> IO[bytes]:
    """The contents, decompressed by the file's suffix; to read once, from the start. UserError on damage."""
    check_regular_file(path)
    return cast(IO[bytes], io.BufferedReader(_Contents(path), CHUNK_BYTES))


def blocks_of(path: Path) -> Iterator[bytes]:
    """The contents in blocks of at most CHUNK_BYTES."""
    with open_bytes(path) as file:
        while block := file.read(CHUNK_BYTES):
            yield block


def lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Number and bytes of each line, its end included. UserError for one longer than LONGEST_LINE."""
    with open_bytes(path) as file:
        number = 1
        while line := file.readline(LONGEST_LINE + 1):
            if len(line) > LONGEST_LINE:
                refuse_long_line(f"{path}, line {number:,}")
            yield number, line
            number += 1


def refuse_long_line(where: str) -> NoReturn:
    """UserError: what has to be in memory at once would not be, of a file that unpacks to one endless line."""
    raise UserError(
        f"{where}: expected at most {LONGEST_LINE:,} bytes in a line, found more; is its format what its name says?"
    )


class _Contents(io.RawIOBase):
    """A raw file of the decompressed bytes, whose errors name the path."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._path = path
        self._file: Any = self._guarded(lambda: _opened(path))

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._guarded(lambda: self._file.read(len(buffer)))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed and hasattr(self, "_file"):
            self._file.close()
        super().close()

    def _guarded(self, call: Any) -> Any:
        try:
            return call()
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{self._path}: broken gzip: {error}; fetch or compress the file again") from error
        except OSError as error:
            kind = "broken Zstandard" if self._path.suffix.lower() == ".zst" else "cannot be read"
            raise UserError(f"{self._path}: {kind}: {os_message(error)}; fetch or compress the file again") from error


def _opened(path: Path) -> Any:
    if path.suffix.lower() == ".gz":
        return gzip.open(path, "rb")
    if path.suffix.lower() == ".zst":
        return import_pyarrow(path).input_stream(str(path), compression="zstd")
    return path.open("rb")


@contextlib.contextmanager
def columnar_errors(path: Path, kind: str = "parquet") -> Iterator[None]:
    """What pyarrow says of a file that is none of its kind, or whose values are none of their type, as a UserError.

    Beside its own errors those of what it makes: text that is not UTF-8, times no calendar has, zones nobody knows.
    """
    pyarrow = import_pyarrow(path)
    try:
        yield
    except (pyarrow.ArrowException, OSError, ValueError, OverflowError, LookupError) as error:
        reason = os_message(error) if isinstance(error, OSError) else str(error)
        message = " ".join(reason.split())[:200]
        raise UserError(f"{path}: not a readable {kind} file: {message}") from error


def import_pyarrow(path: Path) -> Any:
    """The pyarrow library, for a file that needs it. UserError saying how to install it."""
    try:
        import pyarrow
    except ImportError as error:
        extra = "parquet" if plain_suffix(path) == ".parquet" else "events"
        raise UserError(f"{path}: reading it needs pyarrow ({error}): pip install 'protomamba[{extra}]'") from error
    return pyarrow
