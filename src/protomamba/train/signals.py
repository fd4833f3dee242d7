"""A run that is asked to stop finishes its step, saves and says so in its exit code."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from types import FrameType
from typing import Any

STOPPED_EXIT_CODE = 75
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A terminal that goes away. It is sent by the kernel and once more by the shell: a second one is no wish for haste.
_HANGUP = signal.SIGHUP

ECHO_S = 0.05


def _set(action: signal.Handlers) -> None:
    for each in _SIGNALS:
        signal.signal(each, action)


class StopRequest:
    """While its `with` block lasts, the first SIGTERM, SIGINT or SIGHUP sets `requested`, which the loop polls.

    A second SIGTERM or SIGINT ends the process at once: the first puts the system's own action back, so that it works
    even while Python is deep in a kernel. SIGHUP stays ignored from the first signal on, and under `nohup` from the
    start. What follows the first within ECHO_S counts as the same one: coreutils' `timeout`
    signals the process and then its group. Outside the main thread, where handlers cannot be set, only `request()`
    sets the flag. The handlers found at the start are put back at the end.
    """

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self._flag = threading.Event()
        self._former: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return self._flag.is_set()

    def request(self) -> None:
        """Ask the run to stop as a signal would; from any thread."""
        self._flag.set()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.signal = signal.Signals(number)
        self._flag.set()
        _set(signal.SIG_IGN)
        signal.signal(_HANGUP, signal.SIG_IGN)  # a no-op under nohup
        # Not print: a handler may run in the middle of another print to the same stream. The stream may be closed.
        with contextlib.suppress(OSError):
            told = f"\n{self.signal.name}: finishing this step and saving; press Ctrl-C again to exit now\n"
            os.write(2, told.encode())
        time.sleep(ECHO_S)
        _set(signal.SIG_DFL)

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            nohup = signal.getsignal(_HANGUP) is signal.SIG_IGN
            wanted = _SIGNALS if nohup else (*_SIGNALS, _HANGUP)
            self._former = {each: signal.signal(each, self._handle) for each in wanted}
        return self

    def __exit__(self, *_: object) -> None:
        for each, handler in self._former.items():
            # None: a handler set outside Python, which cannot be put back from here.
            signal.signal(each, signal.SIG_DFL if handler is None else handler)
        self._former = {}
