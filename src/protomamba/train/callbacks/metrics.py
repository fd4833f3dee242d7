"""Writes metrics.jsonl, the record of a run that outlives it; metrics_file.py says what a line looks like.

Rules
- A line is written with one system call and ends with a newline. What a kill leaves torn behind the last newline is
  removed when the file is opened again, so every line parses.
- A run that resumes from step S cuts the file in front of the first line with a step beyond S, and appends what it cuts
  to metrics.superseded.jsonl. A fresh run cuts everything. So each step stands once, steps only rise, nothing is lost.
- Lines of the events in `SYNCED` are on the disk when `log` returns: a `checkpoint` line acknowledges a save.
- A full disk does not stop training: the line is kept, the user is warned once, and it is written, in order, as soon as
  there is room. At the end the number of lines that still could not be written is reported. Only a `checkpoint` line
  that the disk refuses stops a run, if that is requested (`must_acknowledge`): a save that nothing
  acknowledges has failed.
- The file may be moved away or cut to nothing while it is written (log rotation): lines go on after whatever is there.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protomamba.errors import UserError
from protomamba.metrics_file import encode_line, parse_line
from protomamba.storage import DISK, Disk, SaveError, write_all

SYNCED = frozenset({"run", "checkpoint", "end"})
MAX_PENDING = 10_000


class MetricsLog:
    """Appends events to `path`. `resumed_step`: the step of the checkpoint the run resumes from; None for a fresh run.

    `warn` gets a line for people when the disk refuses a line, and when it takes them again. UserError if the file
    cannot be opened. One process writes at a time, the run's lock sees to that; its threads may all log.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resumed_step: int | None = None,
        warn: Callable[[str], None] = lambda text: None,
        must_acknowledge: bool = False,
        disk: Disk = DISK,
    ) -> None:
        self.path = Path(path)
        self.dropped = 0
        self._warn = warn
        self._must_acknowledge = must_acknowledge
        # Entered again by the thread that holds it: a warning can be what breaks the console, which is logged.
        self._lock = threading.RLock()
        self._disk = disk
        self._pending: deque[bytes] = deque()
        self._named = False  # whether the file's name is on the disk too, not only what it holds
        self._torn_from: int | None = None  # where a line begins of which only a part is written
        self._last_step = -1 if resumed_step is None else resumed_step
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                _cut(self.path, self._fd, resumed_step)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened for appending: {error.strerror}") from error

    def log(self, event: str, **fields: Any) -> None:
        """Append one line: `event`, the fields in order, and `time` (seconds since 1970) if not given.

        ValueError if a "train" event does not come after the step of the last one. SaveError for a "checkpoint" that
        the disk does not take, if it must be acknowledged; nothing else is raised for a disk.
        """
        with self._lock:
            self._log(event, fields)

    def _log(self, event: str, fields: dict[str, Any]) -> None:
        if event == "train":
            if fields["step"] <= self._last_step:
                raise ValueError(f"train step {fields['step']} logged after step {self._last_step}")
            self._last_step = fields["step"]
        line = encode_line({"event": event, **fields, **({} if "time" in fields else {"time": round(time.time(), 3)})})
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft()
            self.dropped += 1
        self._pending.append(line)
        refused = self._write_pending()
        if event in SYNCED:
            refused = self.sync() or refused
        if refused and event == "checkpoint" and self._must_acknowledge:
            raise SaveError(
                f"{self.path}: the line that acknowledges step {fields.get('step')} was not written"
                f" ({refused.strerror}): {len(line):,} bytes needed, {self._free()} bytes free; the checkpoint is saved"
            )

    def sync(self) -> OSError | None:
        """Wait until every line written so far is on the disk; the error if that is not possible, after a warning."""
        try:
            self._disk.fsync(self._fd)
            if not self._named:
                self._disk.fsync_dir(self.path.parent)
                self._named = True
        except OSError as error:
            self._warn(f"{self.path}: could not be synced: {error.strerror}")
            return error
        return None

    def close(self) -> None:
        """Write what is pending, sync and close; says how many lines were lost to a full disk, if any."""
        self._write_pending()
        lost = self.dropped + len(self._pending)
        if lost:
            self._warn(f"{self.path}: {lost} lines could not be written")
        self.sync()
        os.close(self._fd)

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _write_pending(self) -> OSError | None:
        """Write the lines that wait, in order; the error of the disk that refuses one."""
        was_refused = len(self._pending) > 1
        try:
            while self._pending:
                self._write_line(self._pending[0])
                self._pending.popleft()
        except OSError as error:
            with contextlib.suppress(OSError):
                self._take_back()
            if not was_refused:
                self._warn(f"{self.path}: not written ({error.strerror}); lines are kept in memory until it can be")
            return error
        if was_refused and not self.dropped:
            self._warn(f"{self.path}: writable again, no line is missing")
        return None

    def _write_line(self, line: bytes) -> None:
        """The whole line or nothing of it: the part of it that got through before an error is taken back."""
        self._take_back()
        self._torn_from = os.fstat(self._fd).st_size
        write_all(self._fd, memoryview(line), self._disk)
        self._torn_from = None

    def _take_back(self) -> None:
        # No more than is there: a file that was cut by log rotation since must not be filled up with zeros.
        if self._torn_from is not None and self._torn_from < os.fstat(self._fd).st_size:
            os.ftruncate(self._fd, self._torn_from)
        self._torn_from = None

    def _free(self) -> str:
        try:
            return f"{self._disk.free_bytes(self.path.parent):,}"
        except OSError:
            return "an unknown number of"


def _cut(path: Path, fd: int, resumed_step: int | None) -> None:
    """Remove a torn end, move what is past `resumed_step` aside."""
    keep = good_end = end = 0
    superseded = resumed_step is None
    with open(path, "rb") as file:
        for line in file:
            end += len(line)
            event = parse_line(line)
            if event is None:
                continue
            good_end = end
            superseded = superseded or _step(event) > (resumed_step or 0)
            keep = keep if superseded else end
        file.seek(keep)
        aside = file.read(good_end - keep)
    if aside:
        # A kill between these two leaves the lines in both files; it never leaves them in none.
        _append(path.with_suffix(".superseded.jsonl"), aside)
    os.ftruncate(fd, keep)
    os.fsync(fd)


def _step(event: dict[str, Any]) -> int:
    step = event.get("step")
    return step if isinstance(step, int) else 0


def _append(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        write_all(fd, memoryview(data))
        os.fsync(fd)
    finally:
        os.close(fd)
    DISK.fsync_dir(path.parent)
