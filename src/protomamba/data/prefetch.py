"""Workers that read ahead and own nothing: batch `i` is the same whoever computes it, so only its index is handed out.

The workers are threads. A batch is a few short reads and a widening copy, tens to hundreds of microseconds beside a
training step of tens of milliseconds, most of it in native code that releases the interpreter lock. Processes were
measured too: they save no more than threads do, import torch once more each, send the data through a pipe, and can be
killed on their own. Threads cannot. The measurement: tests/data/measure_loader.py.
"""

from __future__ import annotations

import atexit
import threading
import time
import weakref
from collections.abc import Iterator, Mapping
from types import TracebackType
from typing import Any, Protocol

from protomamba.data.windows import Batch

# How often a waiting consumer looks whether its workers live; it is woken at once when a batch is ready.
CHECK_SECONDS = 1.0
JOIN_SECONDS = 5.0
LAST_SECONDS = 2.0  # on a busy machine 0.5 was too short for one that was inside torch


class BatchSource(Protocol):
    """A stream in which every batch can be computed from its index; `position` is the next one to consume."""

    position: int

    def batch(self, index: int) -> Batch:
        """Batch number `index`; called from several threads at once."""

    def cursor(self, index: int) -> Mapping[str, Any]:
        """The place before batch `index`, for people; `epoch` in it is shown with each step."""

    def state_dict(self) -> dict[str, Any]:
        """The place of `position`."""

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place."""


class _Shared:
    """What consumer and workers share, all of it guarded by `changed`."""

    def __init__(self, source: BatchSource, buffer: int) -> None:
        self.source, self.buffer = source, buffer
        self.changed = threading.Condition()
        self.stopped = False
        self.consumed = 0  # first batch not yet handed to the consumer
        self.claimed = 0  # first batch no worker has taken on
        self.lost: list[int] = []  # taken on by workers that died
        self.ready: dict[int, Batch | BaseException] = {}
        self.in_work: dict[threading.Thread, int] = {}

    def room(self) -> int:
        """Batches that may still be taken on before the buffer is full."""
        return self.consumed + self.buffer - self.claimed

    def may_claim(self) -> bool:
        return self.stopped or bool(self.lost) or self.room() > 0

    def claim(self) -> int | None:
        """Take on the next batch, waiting for room in the buffer; None when it is time to end."""
        with self.changed:
            self.changed.wait_for(self.may_claim)
            if self.stopped:
                return None
            if self.lost:
                index = self.lost.pop()
            else:
                index, self.claimed = self.claimed, self.claimed + 1
            self.in_work[threading.current_thread()] = index
            return index

    def deliver(self, index: int, result: Batch | BaseException) -> None:
        """Put a batch, or the error that came instead, where the consumer looks for it."""
        with self.changed:
            self.in_work.pop(threading.current_thread(), None)
            self.ready[index] = result
            self.changed.notify_all()

    def seek(self, position: int) -> None:
        """Start over at another position; batches already made for it stay valid, being pure functions of the index."""
        self.consumed = self.claimed = position
        self.ready.clear()
        self.lost.clear()

    def stop(self) -> None:
        """Tell the workers to end."""
        with self.changed:
            self.stopped = True
            self.changed.notify_all()


def _work(shared: _Shared) -> None:
    """The life of a worker. An error travels to the consumer and is raised there in its turn."""
    while (index := shared.claim()) is not None:
        try:
            result: Batch | BaseException = shared.source.batch(index)
        except BaseException as error:
            result = error
        shared.deliver(index, result)


_started: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


def _let_workers_end() -> None:
    """At the end of the program: workers that were told to stop get a moment to do so.

    A thread that comes out of native code once the interpreter is being taken apart ends the process by a signal.
    """
    deadline = time.monotonic() + LAST_SECONDS
    for thread in list(_started):
        thread.join(max(0.0, deadline - time.monotonic()))


# Registered before any prefetcher's own finalizer, so it runs after them: they tell the workers to stop.
atexit.register(_let_workers_end)


class Prefetcher:
    """Iterates over a stream from its position, with `workers` threads that keep up to `buffer` batches ready.

    The order and the batches do not depend on either number; 0 workers compute each batch when it is asked for. The
    stream's position counts batches handed out, never those read ahead, so `state_dict` is right at any moment; after
    `load_state_dict`, here or on the stream, it goes on from there. Use as a context manager, or `close` it.
    """

    def __init__(self, stream: BatchSource, workers: int = 0, buffer: int = 16) -> None:
        if workers < 0 or buffer < 1:
            raise ValueError(f"workers {workers}, buffer {buffer}: expected at least 0 and 1")
        self.stream = stream
        self._shared = _Shared(stream, buffer)
        self._threads: list[threading.Thread] = []
        self._workers = workers
        self._expected: int | None = None
        # Also runs at the end of the program, so no worker outlives a forgotten prefetcher.
        self._stop = weakref.finalize(self, self._shared.stop)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        index = self.stream.position
        batch = self.stream.batch(index) if self._workers == 0 else self._take(index)
        self.stream.position = index + 1
        return batch

    def _take(self, index: int) -> Batch:
        if self._shared.stopped:
            raise ValueError("the prefetcher has been closed")
        with self._shared.changed:
            if index != self._expected:
                self._shared.seek(index)
                self._shared.changed.notify_all()
            self._keep_alive()
            while index not in self._shared.ready:
                self._shared.changed.wait(CHECK_SECONDS)
                self._keep_alive()
            result = self._shared.ready.pop(index)
            self._shared.consumed = index + 1
            # Waking a worker for every batch would make it compete for the interpreter lock just when the step begins.
            if self._shared.room() >= max(1, self._shared.buffer // 2):
                self._shared.changed.notify_all()
        if isinstance(result, BaseException):
            self._expected = None  # asking again computes the batch again
            raise result
        self._expected = index + 1
        return result

    def _keep_alive(self) -> None:
        """Start missing workers; what a dead one had taken on is done by another."""
        dead = [thread for thread in self._threads if not thread.is_alive()]
        for thread in dead:
            self._threads.remove(thread)
            index = self._shared.in_work.pop(thread, None)
            if index is not None:
                self._shared.lost.append(index)
                self._shared.changed.notify_all()
        while len(self._threads) < self._workers:
            # Daemons, so that one stuck in a read of a dead disk cannot keep the program from ending.
            thread = threading.Thread(target=_work, args=(self._shared,), name="protomamba-prefetch", daemon=True)
            self._threads.append(thread)
            _started.add(thread)
            thread.start()

    def state_dict(self) -> dict[str, Any]:
        """The stream's place: what has been handed out."""
        return self.stream.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place; batches read ahead for another one are dropped."""
        self.stream.load_state_dict(state)

    def close(self) -> None:
        """End the workers; waits for reads in flight, a few seconds at most."""
        self._stop()
        for thread in self._threads:
            thread.join(JOIN_SECONDS)
        self._threads.clear()

    def __enter__(self) -> Prefetcher:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
