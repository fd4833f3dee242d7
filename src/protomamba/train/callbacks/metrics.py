"""Writes metrics.jsonl, the record of a run that outlives it; metrics_file.py says what a line looks like.

Rules
- A line is written with one system call and ends with a newline. What a kill leaves torn behind the last newline is
  removed when the file is opened again, so every line parses.
- A run that goes on from step S cuts the file in front of the first line with a step beyond S, and appends what it cuts
  to metrics.superseded.jsonl. A fresh run cuts everything. So each step stands once, steps only rise, nothing is lost.
- Lines of the events in `SYNCED` are on the disk when `log` returns: a `checkpoint` line acknowledges a save.
- A full disk does not stop training: the line is kept, the user is told once, and it is written, in order, as soon as
  there is room. What still cannot be written at the end is told by number.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from protomamba.errors import UserError
from protomamba.metrics_file import encode_line, parse_line
from protomamba.storage import DISK, Disk, write_all

SYNCED = frozenset({"run", "checkpoint", "end"})
MAX_PENDING = 10_000


class MetricsLog:
    """Appends events to `path`. `resumed_step`: the step of the checkpoint the run goes on from; None for a fresh run.

    `warn` gets a line for people when the disk refuses a line, and when it takes them again. UserError if the file
    cannot be opened. One writer at a time: the run's lock sees to that.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        resumed_step: int | None = None,
        warn: Callable[[str], None] = lambda text: None,
        disk: Disk = DISK,
    ) -> None:
        self.path = Path(path)
        self.dropped = 0
        self._warn = warn
        self._disk = disk
        self._pending: deque[bytes] = deque()
        self._last_step = -1 if resumed_step is None else resumed_step
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            try:
                self._end = _cut(self.path, self._fd, resumed_step)
            except BaseException:
                os.close(self._fd)
                raise
        except OSError as error:
            raise UserError(f"{self.path}: cannot be opened for appending: {error.strerror}") from error

    def log(self, event: str, **fields: Any) -> None:
        """Append one line: `event`, the fields in order, and `time` (seconds since 1970) if not given.

        ValueError if a "train" event does not come after the step of the last one. Never raises for a full disk.
        """
        if event == "train":
            if fields["step"] <= self._last_step:
                raise ValueError(f"train step {fields['step']} logged after step {self._last_step}")
            self._last_step = fields["step"]
        line = encode_line({"event": event, **fields, **({} if "time" in fields else {"time": round(time.time(), 3)})})
        if len(self._pending) == MAX_PENDING:
            self._pending.popleft()
            self.dropped += 1
        self._pending.append(line)
        self._write_pending()
        if event in SYNCED:
            self.sync()

    def sync(self) -> None:
        """Wait until every line written so far is on the disk."""
        try:
            self._disk.fsync(self._fd)
        except OSError as error:
            self._warn(f"{self.path}: could not be synced: {error.strerror}")

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

    def _write_pending(self) -> None:
        was_refused = len(self._pending) > 1
        try:
            if was_refused:
                os.ftruncate(self._fd, self._end)
            while self._pending:
                write_all(self._fd, memoryview(self._pending[0]), self._disk)
                self._end += len(self._pending.popleft())
        except OSError as error:
            # Take back the part of the line that did get through, so that every line of the file parses.
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._end)
            if not was_refused:
                self._warn(f"{self.path}: not written ({error.strerror}); lines are kept until there is room")
            return
        if was_refused and not self.dropped:
            self._warn(f"{self.path}: written again, nothing missing")


def _cut(path: Path, fd: int, resumed_step: int | None) -> int:
    """Remove a torn end, move what is past `resumed_step` aside; returns the length of what stays."""
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
    return keep


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
