"""Arrays of numpy as others may have made them: .npy and .npz read without pickle, and damage as one clear error."""

from __future__ import annotations

import math
import os
import threading
import tokenize
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import numpy.typing as npt

from protomamba.data.files import os_message
from protomamba.errors import UserError

# A .npz may say that it unpacks to more than it can hold: up to here it is believed, and beyond it up to a factor.
FREE_BYTES, MOST_FACTOR = 1 << 30, 200
# numpy reads a header as Python's literals, with Python's own parser and tokenizer, whose word for too many brackets is
# MemoryError; so is numpy's for 10^18 elements. zipfile knows some methods by name only.
ERRORS = (
    *(ValueError, SyntaxError, EOFError, TypeError, RecursionError, MemoryError, OverflowError),
    *(tokenize.TokenError, Warning, zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, KeyError),
)
# Shards are looked at by several threads, and until 3.11.4 Python's parser counts its depth for all of them together:
# one that is interrupted in another's midst ends with a SystemError. A child forked meanwhile has a lock of its own.
_parsing = threading.Lock()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=lambda: globals().update(_parsing=threading.Lock()))
Array = npt.NDArray[Any]
T = TypeVar("T")


def read_npy_header(path: Path, file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and element type; `file` then stands at the first element. UserError if it is not readable."""
    return _guarded(path, ".npy", lambda: _header(file))


def load_npy(path: Path, mmap: bool = False) -> Array:
    """The array of a .npy file, read or mapped. UserError if it is not a readable one of plain elements."""
    found = _guarded(path, ".npy", lambda: np.load(path, mmap_mode="r" if mmap else None, allow_pickle=False))
    if not isinstance(found, np.ndarray):  # an archive by that name
        found.close()
        raise UserError(f"{path}: expected a .npy file of one array, found an archive of several (.npz)")
    return found


def load_npz(path: Path) -> dict[str, Array]:
    """The arrays of a .npz file by name. UserError if one is not readable or unpacks to more than it may."""
    return _guarded(path, ".npz", lambda: _members(path))


def _header(file: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(file)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError(f"version {version} of the format is for structured arrays")
    with _parsing:
        shape, _, dtype = readers[version](file)
    return shape, dtype


def _members(path: Path) -> dict[str, Array]:
    with zipfile.ZipFile(path) as archive:
        names = [each.filename for each in archive.infolist()]
        if double := next((name for name in names if names.count(name) > 1), None):
            raise ValueError(f"two arrays of the name {double!r}")
        _check_expansion(sum(each.file_size for each in archive.infolist()), path.stat().st_size)
        return {name.removesuffix(".npy"): _member(archive, name) for name in names}


def _member(archive: zipfile.ZipFile, name: str) -> Array:
    with archive.open(name) as file:
        shape, dtype = _header(file)
    promised, held = math.prod(shape) * dtype.itemsize, archive.getinfo(name).file_size
    if dtype.hasobject or promised > held:
        raise ValueError(f"{name!r} promises {shape} of {dtype} and holds {held:,} bytes")
    with archive.open(name) as file:
        return np.asarray(np.lib.format.read_array(file, allow_pickle=False))


def _check_expansion(unpacked: int, size: int) -> None:
    if unpacked > max(FREE_BYTES, MOST_FACTOR * size):
        raise ValueError(
            f"{size:,} bytes that would unpack to {unpacked:,}; expected at most {FREE_BYTES:,} or {MOST_FACTOR} times "
            "the file; save it with numpy.savez, which does not compress"
        )


def _guarded(path: Path, kind: str, read: Callable[[], T]) -> T:
    try:
        return read()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}") from error
    except ERRORS as error:
        # The first sentence: numpy goes on to advise `allow_pickle`.
        message = " ".join(str(error).split()).split(". ")[0][:200] or type(error).__name__
        raise UserError(f"{path}: not a readable {kind} file: {message}") from error
