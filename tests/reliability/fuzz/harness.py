"""Runs one reader over mutated files in this process and says of each that went wrong what it was.

What may happen: the file is read, or a UserError of one line. What may not: any other exception, more than 5 s of
processor time, memory beyond 200 MB plus four times the file over what the idle process holds, or the process's end,
which the parent sees (`__main__`).
"""

from __future__ import annotations

import contextlib
import gc
import hashlib
import os
import random
import resource
import shutil
import signal
import tempfile
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from protomamba.errors import UserError
from tests.reliability.fuzz.readers import READERS, Reader

SECONDS = 5.0
SPARE_BYTES = 200 << 20
# In memory where there is such a place: what `prepare` syncs to a disk would be most of the time of a file.
HOME = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
CORPUS = Path(__file__).parents[2] / "fixtures" / "fuzz"


class TooSlow(BaseException):
    """The processor time of one file is used up."""


def _out_of_time(number: int, frame: FrameType | None) -> None:
    raise TooSlow


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextlib.contextmanager
def good_input(reader: Reader) -> Iterator[tuple[Path, bytes]]:
    """A fresh folder with the reader's good input: the file to mutate, and its bytes."""
    with tempfile.TemporaryDirectory(prefix="fuzz-", dir=HOME) as home:
        path = reader.make(Path(home))
        yield path, path.read_bytes()


def problem_with(reader: Reader, path: Path, data: bytes, idle_bytes: int) -> str | None:
    """Read `data` as the file `path`; None, or in one line what should not have happened."""
    path.write_bytes(data)
    signal.signal(signal.SIGPROF, _out_of_time)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            reader.read(path)
    except UserError as error:
        text = str(error)
        if any(character in text for character in "\r\n") and ":\n  " not in text:
            return f"a message of several lines: {text[:200]!r}"
    except TooSlow:
        return f"more than {SECONDS:g} s of processor time"
    except BaseException as error:  # a panic of Rust is no Exception
        place = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__}: {str(error)[:150]!r} at {Path(place.filename).name}:{place.lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    grown = peak_bytes() - idle_bytes
    allowed = SPARE_BYTES + 4 * len(data)
    return f"memory grew by {grown:,} bytes, allowed {allowed:,}" if grown > allowed else None


def variant(reader: Reader, good: bytes, seed: int) -> bytes:
    return reader.mutate(good, random.Random(seed))


def fuzz(name: str, first: int, count: int) -> Iterator[tuple[int, str | None]]:
    """Each seed of [first, first + count) before (None) and after it was tried, with what went wrong with it."""
    reader = READERS[name]
    with good_input(reader) as (path, good):
        reader.read(path)
        gc.collect()
        idle = peak_bytes()
        kept = {each.name for each in path.parent.iterdir()}
        for seed in range(first, first + count):
            yield seed, None
            found = problem_with(reader, path, variant(reader, good, seed), idle)
            if found:
                yield seed, found
                idle = peak_bytes()  # a peak stays: the files behind are held against it, not each called a failure
            _tidy(path.parent, kept)


def _tidy(folder: Path, kept: set[str]) -> None:
    """Remove what reading left, so that one file does not change what the next is."""
    for name in os.listdir(folder):
        if name not in kept:
            each = folder / name
            shutil.rmtree(each) if each.is_dir() and not each.is_symlink() else each.unlink()


def keep(name: str, data: bytes) -> Path:
    """Put a file that failed into the corpus, which every test run reads again."""
    folder = CORPUS / name.replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / hashlib.sha256(data).hexdigest()[:16]
    path.write_bytes(data)
    return path
