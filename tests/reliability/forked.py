"""The real command line in processes that cost milliseconds: thousands of kills in minutes.

A server (`serve.py`) imports torch and the package once, starts no thread, and forks a child for each
run. The child calls `main` with the real arguments, in a process and a process group of its own, with the system's own
signal actions, reads and writes the real files, and ends through the interpreter's own exit. What a fresh interpreter
would do differently is only to import the modules, before it has touched any file; a few trials in each test start one
all the same. The signals are the system's, sent to the child's pid.

A `plan` is done inside the child, at an exact place: see `Plan`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Plan:
    """What a child does to itself. Calls count from 0.

    at_batch/signal: sends itself `signal` when it asks for that (micro-)batch of this process. batches: a file that
    gets a line "index hash" for each batch. disk_call/disk_action: at that call of the disk fails with the errno, or
    "kill-before", "kill-after". stall: a file that is made when the first save after a stop request hangs, forever.
    disk_calls: a file that gets the names of all disk calls. audit: a file that gets what the process opened for
    writing, connected to, or ran. memory: a file that gets "step resident-bytes open-files threads" lines.
    starve: "step", "save" or "worker", from whose third call on the process may have 64 MB more and asks for 1 GB.
    """

    at_batch: int | None = None
    signal: int = signal.SIGTERM
    batches: str | None = None
    disk_call: int | None = None
    disk_action: str | int = "kill-before"
    disk_forever: bool = False
    disk_calls: str | None = None
    stall: str | None = None
    audit: str | None = None
    memory: str | None = None
    starve: str | None = None


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, or minus the signal that killed it, and all it printed."""

    code: int
    output: str


class Child:
    """A run in progress."""

    def __init__(self, server: ForkServer, pid: int, output: Path) -> None:
        self._server, self.pid, self._output = server, pid, output

    def send(self, number: int) -> None:
        """The signal, if the child still lives; it has not been waited for, so the pid is its own."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def said(self) -> str:
        return self._output.read_text(errors="replace") if self._output.exists() else ""

    def wait_until(self, text: str, seconds: float = 60.0) -> None:
        """Wait for a text in the output."""
        limit = time.monotonic() + seconds
        while text not in self.said():
            assert time.monotonic() < limit, f"no {text!r} in: {self.said()}"
            time.sleep(0.002)

    def wait(self) -> Ended:
        status = self._server.ask({"wait": self.pid})["status"]
        code = os.waitstatus_to_exitcode(status)
        return Ended(code, self.said())


class ForkServer:
    """Starts children; use as a context manager, from one thread."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._count = folder, 0

    def start(self, arguments: Sequence[object], plan: Plan | None = None) -> Child:
        """Begin `protomamba *arguments` in a forked child."""
        self._count += 1
        output = self._folder / f"output-{self._count}"
        request = {"argv": list(map(str, arguments)), "output": str(output), "plan": asdict(plan or Plan())}
        return Child(self, self.ask(request)["pid"], output)

    def run(self, arguments: Sequence[object], plan: Plan | None = None) -> Ended:
        return self.start(arguments, plan).wait()

    def ask(self, request: dict[str, object]) -> dict[str, int]:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the fork server ended"
        answer: dict[str, int] = json.loads(line)
        return answer

    def __enter__(self) -> ForkServer:
        path = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.reliability.serve"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            # The interpreter's cache of compiled modules, where it is not there yet, is no file that a command writes.
            env={**os.environ, "PYTHONPATH": path, "PYTHONDONTWRITEBYTECODE": "1"}
            | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        )
        try:
            assert self.ask({"ready": True})["threads"] == 1, "a process with threads must not fork"
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()
