"""One process that writes in a folder: a lock that ends with its holder, and tells who that is."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import time
import weakref
from pathlib import Path
from typing import Any, Self

from protomamba.errors import UserError


class FolderLock:
    """Holds the file `name` in a folder for the life of a `with` block; a second holder is refused, naming the first.

    The system's own lock decides, and it ends with its process however that dies; the JSON inside (pid, host, started)
    is for people. `took_over` is what a holder that died without releasing the lock had written there.
    """

    name = "lock"
    holder = "another process"  # as whom a refusal names the first

    def __init__(self, folder: str | os.PathLike[str]) -> None:
        self.path = Path(folder) / self.name
        self.took_over: dict[str, Any] | None = None
        self._fd: int | None = None

    def acquire(self) -> Self:
        """Take the lock or raise UserError at once; the folder must exist."""
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise UserError(f"{self.path}: the folder's lock cannot be opened: {error.strerror}") from error
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(fd)
            os.close(fd)
            raise UserError(self._refusal(error, holder)) from error
        self._fd = fd
        self.took_over = _read(fd)
        started = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        _rewrite(fd, {"pid": os.getpid(), "host": socket.gethostname(), "started": started})
        _held.add(self)
        return self

    def release(self) -> None:
        """Give the lock up; the file stays, empty, because removing it would let two later holders lock two files."""
        if self._fd is not None:
            _rewrite(self._fd, None)
            self._drop()

    def _drop(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        _held.discard(self)

    def _refusal(self, error: OSError, holder: dict[str, Any] | None) -> str:
        if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
            return f"{self.path}: the file system refuses to lock it ({error.strerror}): choose a local --out-dir"
        who = holder or {}
        return (
            f"{self.path.parent}: in use by {self.holder} (pid {who.get('pid', 'unknown')} on host"
            f" {who.get('host', 'unknown')}, since {who.get('started', 'unknown')}): wait for it, stop it,"
            " or choose another --out-dir"
        )

    def __enter__(self) -> Self:
        return self.acquire()

    def __exit__(self, *_: object) -> None:
        self.release()


def left_behind(folder: Path) -> str | None:
    """Of a folder that this process has locked: who held it before and died without a word; None for nobody."""
    for lock in _held:
        if lock.path.parent == folder and lock.took_over is not None:
            who = {key: lock.took_over.get(key, "unknown") for key in ("pid", "host", "started")}
            return f"pid {who['pid']} on host {who['host']}, since {who['started']}"
    return None


def _read(fd: int) -> dict[str, Any] | None:
    try:
        holder = json.loads(os.pread(fd, 4096, 0))
    except (ValueError, RecursionError):
        return None
    return holder if isinstance(holder, dict) else None


def _rewrite(fd: int, holder: dict[str, Any] | None) -> None:
    # The lock holds without its note: a full disk must not stop its holder here.
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        if holder is not None:
            os.pwrite(fd, json.dumps(holder).encode() + b"\n", 0)


# A forked worker shares the lock and would hold it beyond its holder's death; it closes its copy, releasing nothing.
_held: weakref.WeakSet[FolderLock] = weakref.WeakSet()


def _drop_all() -> None:
    for lock in list(_held):
        lock._drop()


os.register_at_fork(after_in_child=_drop_all)
