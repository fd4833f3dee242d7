"""Files that are either wholly there or not at all: the commit protocol, over one small seam to the system.

A commit writes a temporary file in the target's folder, syncs it, renames it over the target and syncs the folder.
Everything that can fail goes through a `Disk`, so that a test can make the n-th call fail, or kill the process there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import io
import itertools
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, cast

from protomamba.errors import UserError

# Names that one save alone has (temporary files, numbered checkpoints) are strings: pathlib interns parts of paths,
# and the table of interned strings grows by megabytes, for good, when some ten thousands have come and gone.
PathText = str | os.PathLike[str]

# A kill can leave one of these behind; whoever holds the run's lock may remove it.
_TEMPORARY = re.compile(r"\.(?P<target>.+)\.\d+-\d+\.tmp")
_serial = itertools.count()


class SaveError(UserError):
    """A file could not be saved. The subclass says whether the new content can be seen."""


class NotCommittedError(SaveError):
    """Nothing has changed: what was there before is still there, whole."""


class DurabilityUnknownError(SaveError):
    """The new file is in place and whole, but a power cut may still bring the old one back."""


class Disk:
    """The system calls of a save, one method each; unbuffered, so that there is nothing to flush before `fsync`."""

    def free_bytes(self, folder: Path) -> int:
        found = os.statvfs(folder)
        return found.f_bavail * found.f_frsize

    def open(self, path: PathText) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)

    def write(self, fd: int, data: memoryview) -> int:
        return os.write(fd, data)

    def fsync(self, fd: int) -> None:
        # On macOS fsync stops at the drive's cache; F_FULLFSYNC goes through it where the file system has it.
        if hasattr(fcntl, "F_FULLFSYNC"):
            with contextlib.suppress(OSError):
                fcntl.fcntl(fd, fcntl.F_FULLFSYNC)
                return
        os.fsync(fd)

    def close(self, fd: int) -> None:
        os.close(fd)

    def replace(self, source: PathText, target: PathText) -> None:
        os.replace(source, target)

    def fsync_dir(self, folder: Path) -> None:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        except OSError as error:
            # Some network file systems have no such operation: then there is nothing more that could be done.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(fd)

    def link(self, source: PathText, target: PathText) -> None:
        os.link(source, target)

    def unlink(self, path: PathText) -> None:
        os.unlink(path)


DISK = Disk()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, for good. NotCommittedError if that is not possible."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for each in missing:  # its name is in the folder above it
            DISK.fsync_dir(each.parent)
    except OSError as error:
        raise NotCommittedError(f"{folder}: the folder cannot be created: {_reason(error)}") from error


def write_all(fd: int, data: memoryview, disk: Disk = DISK) -> None:
    """Write every byte of `data` (format B); a short write is continued, one of nothing is an OSError."""
    while data:
        written = disk.write(fd, data)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        data = data[written:]


def commit(path: PathText, size: int, chunks: Iterable[memoryview], disk: Disk = DISK) -> None:
    """Put `size` bytes, given as `chunks`, at `path`: all of them or none.

    Raises NotCommittedError (the old file stands) or DurabilityUnknownError (the new one stands, not surely for good).
    """

    with _installed(path, disk, size) as temporary:
        if disk.free_bytes(_folder(path)) < size:
            raise OSError(errno.ENOSPC, "not enough free space")
        fd = disk.open(temporary)
        try:
            for chunk in chunks:
                write_all(fd, chunk, disk)
            disk.fsync(fd)
        finally:
            disk.close(fd)


@contextlib.contextmanager
def atomic_file(path: Path, disk: Disk = DISK) -> Iterator[IO[bytes]]:
    """An unbuffered, seekable file to write; at the end of the block it stands at `path`, all of it or nothing.

    Raises as `commit`; when the block raises, what was at `path` before is still there.
    """
    with _installed(path, disk) as temporary:
        fd = disk.open(temporary)
        try:
            yield cast(IO[bytes], _Written(fd, disk))
            disk.fsync(fd)
        finally:
            disk.close(fd)


@contextlib.contextmanager
def atomic_path(path: Path, disk: Disk = DISK) -> Iterator[Path]:
    """`atomic_file` for a library that writes the file itself: the block writes at the path it is given."""
    with _installed(path, disk) as temporary:
        yield Path(temporary)
        fd = os.open(temporary, os.O_RDONLY | os.O_CLOEXEC)
        try:
            disk.fsync(fd)
        finally:
            disk.close(fd)


def write_json(path: Path, content: Mapping[str, Any], disk: Disk = DISK, *, sort_keys: bool = False) -> None:
    """Put `content` at `path` as readable JSON, atomically; with `sort_keys` equal values are equal bytes.

    Raises as `commit`, and ValueError for NaN and Infinity, which are no JSON.
    """
    data = (json.dumps(content, indent=2, allow_nan=False, sort_keys=sort_keys) + "\n").encode()
    commit(path, len(data), [memoryview(data)], disk)


class _Written(io.RawIOBase):
    """A file being written through a `Disk`; the descriptor stays its maker's."""

    def __init__(self, fd: int, disk: Disk) -> None:
        super().__init__()
        self._fd, self._disk = fd, disk

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        view = memoryview(data).cast("B")
        write_all(self._fd, view, self._disk)
        return len(view)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        return os.lseek(self._fd, offset, whence)


def commit_link(source: Path, target: PathText, disk: Disk = DISK) -> None:
    """Give the file `source` the second name `target`, atomically: a hard link, or a copy where links are not possible.

    Safe because a committed file is never written to again: a later save puts another file under the first name.
    """
    if source.exists() and os.path.exists(target) and source.samefile(target):
        # Between two names of one file a rename does nothing, and would leave the temporary name behind.
        return
    try:
        with _installed(target, disk) as temporary:
            disk.link(source, temporary)
    except NotCommittedError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno in (errno.EIO, errno.ENOSPC, errno.ENOENT):
            raise
        commit(target, source.stat().st_size, _blocks(source), disk)


def _blocks(path: Path) -> Iterator[memoryview]:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            yield memoryview(block)


@contextlib.contextmanager
def _installed(path: PathText, disk: Disk, size: int | None = None) -> Iterator[str]:
    """A temporary path to make a file at, which is renamed to `path` at the end of the block."""
    _refuse_what_is_no_file(path)
    folder, name = os.path.split(path)
    temporary = os.path.join(folder, f".{name}.{os.getpid()}-{next(_serial)}.tmp")
    try:
        yield temporary
        disk.replace(temporary, path)
    except BaseException as error:
        # A file whose fsync failed is not synced again: the system may have dropped its pages and report success then.
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        if isinstance(error, OSError):
            raise NotCommittedError(_failure(path, size, error, disk)) from error
        raise
    try:
        disk.fsync_dir(_folder(path))
    except OSError as error:
        raise DurabilityUnknownError(
            f"{path}: saved and readable, but its folder could not be synced ({_reason(error)}):"
            " a power cut may bring the earlier file back"
        ) from error


def _folder(path: PathText) -> Path:
    return Path(os.path.dirname(path) or os.curdir)


def _refuse_what_is_no_file(path: PathText) -> None:
    """A rename would put a file in the place of a device, pipe or socket: of /dev/null too, for who may write there."""
    try:
        mode = os.lstat(path).st_mode
    except OSError:
        return  # nothing there, or what the write itself will say
    except ValueError as error:
        raise NotCommittedError(f"{os.fspath(path)!r}: not saved: not a file name: {error}") from error
    if not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
        found = "a folder" if stat.S_ISDIR(mode) else "a device, pipe or socket"
        raise NotCommittedError(f"{path}: not saved: expected a file or nothing there, found {found}")


def _failure(path: PathText, size: int | None, error: OSError, disk: Disk) -> str:
    try:
        free = f"{disk.free_bytes(_folder(path)):,}"
    except OSError:
        free = "an unknown number of"
    needed = "" if size is None else f"{size:,} bytes needed, "
    return (
        f"{path}: not saved ({_reason(error)}): {needed}{free} bytes free in {_folder(path)};"
        " the earlier file, if any, is untouched"
    )


def _reason(error: OSError) -> str:
    return error.strerror or str(error)


def remove_stale_temporaries(folder: Path, targets: Callable[[str], bool]) -> list[Path]:
    """Remove what killed saves left in `folder` for files whose name satisfies `targets`; the caller holds the lock."""
    removed = []
    for path in folder.iterdir():
        match = _TEMPORARY.fullmatch(path.name)
        if match and targets(match["target"]):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
