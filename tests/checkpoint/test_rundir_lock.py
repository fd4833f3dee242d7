"""Promise 9 of the reliability design: one run per folder, with real second processes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from protomamba.checkpoint.folder import RunLock
from protomamba.errors import UserError

# Takes the lock, says so, and holds it until its input ends; "fork" leaves a child behind that lives on.
HOLDER = r"""
import os, sys
from protomamba.checkpoint.lock import RunLock
with RunLock(sys.argv[1]):
    if sys.argv[2] == "fork" and os.fork() == 0:
        os.write(1, b"child\n")
        sys.stdin.read()
        os._exit(0)
    os.write(1, b"locked\n")
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path, mode: str = "plain") -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", HOLDER, str(folder), mode]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = sorted(process.stdout.readline() for _ in range(2 if mode == "fork" else 1))
        assert lines[-1] == "locked\n"
        yield process


def test_a_second_run_is_refused_by_the_pid_and_host_of_the_first(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        with pytest.raises(UserError, match=rf"in use .*pid {first.pid} on host {socket.gethostname()}, since 20"):
            RunLock(tmp_path).acquire()
        first.communicate()
    with RunLock(tmp_path) as lock:
        assert lock.took_over is None


def test_the_lock_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    with holder(tmp_path) as first:
        first.kill()
        first.wait()
        with RunLock(tmp_path) as lock:
            assert lock.took_over is not None and lock.took_over["pid"] == first.pid
            assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()


def test_a_worker_that_outlives_its_run_does_not_hold_the_lock(tmp_path: Path) -> None:
    with holder(tmp_path, "fork") as first:
        first.send_signal(signal.SIGKILL)
        first.wait()
        with RunLock(tmp_path) as lock:
            assert lock.took_over is not None and lock.took_over["pid"] == first.pid


def test_a_worker_that_ends_does_not_release_the_lock(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(UserError, match=f"pid {os.getpid()}"):
            RunLock(tmp_path).acquire()


def test_the_lock_ends_with_its_block_also_by_an_error_and_can_be_taken_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    with pytest.raises(RuntimeError), lock:
        raise RuntimeError
    with lock, pytest.raises(UserError):
        RunLock(tmp_path).acquire()
    lock.release()
    with RunLock(tmp_path):
        pass


def test_a_lock_file_with_something_else_in_it_is_no_obstacle(tmp_path: Path) -> None:
    for content in (b"", b"\xff\xfe", b"[1]", b'{"pid": 1'):
        (tmp_path / "lock").write_bytes(content)
        with RunLock(tmp_path) as lock:
            assert lock.took_over is None


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="lock cannot be opened: No such file"):
        RunLock(tmp_path / "no").acquire()
