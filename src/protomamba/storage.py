"""Files that are either wholly there or not at all: the commit protocol, over one small seam to the system.

A commit writes a temporary file in the target's folder, syncs it, renames it over the target and syncs the folder.
Everything that can fail goes through a `Disk`, so that a test can make the n-th call fail, or kill the process there.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from protomamba.errors import UserError

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
        stat = os.statvfs(folder)
        return stat.f_bavail * stat.f_frsize

    def open(self, path: Path) -> int:
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

    def replace(self, source: Path, target: Path) -> None:
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

    def link(self, source: Path, target: Path) -> None:
        os.link(source, target)

    def unlink(self, path: Path) -> None:
        os.unlink(path)


DISK = Disk()


def write_all(fd: int, data: memoryview, disk: Disk = DISK) -> None:
    """Write every byte of `data` (format B); a short write is continued, one of nothing is an OSError."""
    while data:
        written = disk.write(fd, data)
        if written == 0:
            raise OSError(errno.EIO, "the system wrote nothing and gave no reason")
        data = data[written:]


def commit(path: Path, size: int, chunks: Iterable[memoryview], disk: Disk = DISK) -> None:
    """Put `size` bytes, given as `chunks`, at `path`: all of them or none.

    Raises NotCommittedError (the old file stands) or DurabilityUnknownError (the new one stands, not surely for good).
    """

    def write(temporary: Path) -> None:
        free = disk.free_bytes(path.parent)
        if free < size:
            raise OSError(errno.ENOSPC, "not enough free space")
        fd = disk.open(temporary)
        try:
            for chunk in chunks:
                write_all(fd, chunk, disk)
            disk.fsync(fd)
        finally:
            disk.close(fd)

    _install(path, size, write, disk)


def commit_link(source: Path, target: Path, disk: Disk = DISK) -> None:
    """Give the file `source` the second name `target`, atomically: a hard link, or a copy where links are not possible.

    Safe because a committed file is never written to again: a later save puts another file under the first name.
    """
    if source.exists() and target.exists() and source.samefile(target):
        # Between two names of one file a rename does nothing, and would leave the temporary name behind.
        return
    try:
        _install(target, 0, lambda temporary: disk.link(source, temporary), disk)
    except NotCommittedError as error:
        if not isinstance(error.__cause__, OSError) or error.__cause__.errno in (errno.EIO, errno.ENOSPC, errno.ENOENT):
            raise
        commit(target, source.stat().st_size, _blocks(source), disk)


def _blocks(path: Path) -> Iterator[memoryview]:
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            yield memoryview(block)


def _install(path: Path, size: int, make: Callable[[Path], None], disk: Disk) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{next(_serial)}.tmp")
    try:
        make(temporary)
        disk.replace(temporary, path)
    except BaseException as error:
        # A file whose fsync failed is not synced again: the system may have dropped its pages and report success then.
        with contextlib.suppress(OSError):
            disk.unlink(temporary)
        if isinstance(error, OSError):
            raise NotCommittedError(_failure(path, size, error, disk)) from error
        raise
    try:
        disk.fsync_dir(path.parent)
    except OSError as error:
        raise DurabilityUnknownError(
            f"{path}: saved and readable, but its folder could not be synced ({_reason(error)}):"
            " a power cut may bring the earlier file back"
        ) from error


def _failure(path: Path, size: int, error: OSError, disk: Disk) -> str:
    try:
        free = f"{disk.free_bytes(path.parent):,}"
    except OSError:
        free = "an unknown number of"
    return (
        f"{path}: not saved ({_reason(error)}): {size:,} bytes needed, {free} bytes free in {path.parent};"
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
