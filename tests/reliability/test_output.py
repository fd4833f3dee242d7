"""A run does not depend on anyone listening: pipes, full disks, terminals that go away, closed descriptors."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from protomamba.checkpoint import file as checkpoint
from tests.marks import slow
from tests.reliability.promises import Trials
from tests.runs import flags, metrics, token_file

SHORT = ["--steps", 40, "--save-every", 20, "--val-every", 20]
LONG = ["--steps", 1_000_000, "--save-every", 5, "--val-every", 1_000_000]


def command(arguments: Sequence[str], redirections: str) -> list[str]:
    """The command line under a shell that closes or redirects its standard streams first."""
    return ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "protomamba", *arguments]


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", **more}


def whole(folder: Path, step: int) -> str | None:
    """None if the run in `folder` ended in order at `step`, saved."""
    end = metrics(folder)[-1]
    if (end["event"], end.get("reason"), end.get("step")) != ("end", "done", step):
        return f"last line {end}"
    found = checkpoint.load(folder / "latest.safetensors").info["step"]
    return None if found == step else f"latest is of step {found}"


BROKEN = {
    "full": (">/dev/full", "No space left on device"),
    "both full": (">/dev/full 2>&1", "No space left on device"),
    "file limit": (None, "File too large"),
}


@pytest.mark.parametrize("kind", ["both full", slow("full"), slow("file limit")])
def test_a_full_disk_under_standard_output(kind: str, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    counted, folder = trials(12), tmp_path / "run"
    redirection, reason = BROKEN[kind]
    big = tmp_path / "big"
    big.write_bytes(b"x" * (1 << 22))
    # The limit is in blocks of 512 or 1024 bytes: less than what is in the file already, more than a checkpoint has.
    run = command(flags(folder, token_file(tmp_path), *SHORT), redirection or f">>{big}")
    if redirection is None:
        run = ["sh", "-c", 'ulimit -f 2048; exec "$@"', "sh", *run]
    ended = subprocess.run(run, capture_output=True, text=True, env=environment())
    counted.add(None if ended.returncode == 0 else f"exit {ended.returncode}: {ended.stderr[-300:]}")
    counted.add(whole(folder, 40))
    lost = metrics(folder, "output_lost")
    counted.add(None if [line["error"] for line in lost] == [reason] else f"told: {lost}")
    counted.add("a traceback" if "Traceback" in ended.stderr or "Exception ignored" in ended.stderr else None)
    if kind == "full":
        counted.add(None if ended.stderr.count(f"protomamba: standard output: {reason}; ") == 1 else ended.stderr)
    counted.finish()


@pytest.mark.parametrize("progress", [slow(0), 1])
def test_a_reader_that_leaves(progress: int, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    counted, folder = trials(12), tmp_path / "run"
    process = subprocess.Popen(
        command(flags(folder, token_file(tmp_path), *SHORT, "--progress", progress), ""),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    with process.stderr as stderr:
        said = stderr.read().decode()
    counted.add(None if process.wait() == 0 else f"exit {process.returncode}: {said[-300:]}")
    counted.add(whole(folder, 40))
    counted.add(None if len(metrics(folder, "output_lost")) == 1 else "not told once")
    counted.add(None if said.count("protomamba: standard output: Broken pipe; ") == 1 else said)
    counted.finish()


class Terminal:
    """A run in a pseudo-terminal of its own session, as a window or a login has it."""

    def __init__(self, arguments: Sequence[str], ignore_hangup: bool, columns: int = 80, rows: int = 24) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, rows)

        def begin() -> None:
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)
            signal.signal(signal.SIGHUP, signal.SIG_IGN if ignore_hangup else signal.SIG_DFL)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "protomamba", *arguments],
            stdin=slave,
            stdout=slave,
            stderr=slave,
            preexec_fn=begin,
            env={**environment(TERM="xterm")},
        )
        os.close(slave)

    def resize(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def read_until(self, text: bytes, seconds: float = 60) -> bytes:
        seen, limit = b"", time.monotonic() + seconds
        while text not in seen:
            assert time.monotonic() < limit, seen[-500:]
            seen += os.read(self.master, 4096)
        return seen

    def drain(self) -> bytes:
        seen = b""
        try:
            while block := os.read(self.master, 4096):
                seen += block
        except OSError:  # a terminal whose last process has ended
            pass
        return seen


@pytest.mark.parametrize("progress", [slow(0), 1])
@pytest.mark.parametrize("ignored", [slow(True), False], ids=["nohup", "hangup"])
def test_a_terminal_that_goes_away(
    ignored: bool, progress: int, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """With SIGHUP ignored the run goes on to its end; without, it saves and ends as after SIGTERM."""
    counted, folder = trials(12), tmp_path / "run"
    steps = [*LONG, "--steps", 400] if ignored else LONG
    terminal = Terminal(flags(folder, token_file(tmp_path), *steps, "--progress", progress), ignored)
    terminal.read_until(b"loss ")
    os.close(terminal.master)
    code = terminal.process.wait(120)
    counted.add(None if code == (0 if ignored else 75) else f"exit {code}")
    end = metrics(folder)[-1]
    counted.add(None if end.get("reason") == ("done" if ignored else "signal") else f"last line {end}")
    held = checkpoint.load(folder / "latest.safetensors").info["step"]
    counted.add(None if held == end["step"] else f"saved {held}, ended at {end['step']}")
    if ignored:
        counted.add(None if len(metrics(folder, "output_lost")) == 1 else "not told once")
    counted.finish()


@pytest.mark.parametrize("columns", [slow(0), slow(1), slow(2), 10, slow(65_535)])
def test_a_bar_in_a_terminal_of_any_width(columns: int, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    counted, folder = trials(12), tmp_path / "run"
    terminal = Terminal(flags(folder, token_file(tmp_path), *SHORT, "--progress", 1), True)
    terminal.read_until(b"protomamba")
    terminal.resize(columns, 1)
    said = terminal.drain()
    counted.add(None if terminal.process.wait(60) == 0 else f"exit {terminal.process.returncode}: {said[-300:]!r}")
    counted.add(whole(folder, 40))
    counted.add("a traceback" if b"Traceback" in said else None)
    os.close(terminal.master)
    counted.finish()


@pytest.mark.parametrize("progress", [slow(0), 1])
@pytest.mark.parametrize("encoding", ["ascii", slow("latin-1"), slow("cp1252"), slow("utf-16")])
def test_an_encoding_that_lacks_characters(
    encoding: str, progress: int, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, folder = trials(12), tmp_path / "läufe-✓-\udcff"
    run = command(flags(folder, token_file(tmp_path), *SHORT, "--progress", progress), "")
    ended = subprocess.run(run, capture_output=True, env=environment(PYTHONIOENCODING=encoding, LC_ALL="C"))
    counted.add(None if ended.returncode == 0 else f"exit {ended.returncode}: {ended.stderr[-500:]!r}")
    counted.add(whole(folder, 40))
    counted.finish()


@pytest.mark.parametrize(
    "closed",
    [slow("0<&-"), slow("1>&-"), slow("2>&-"), slow("1>&- 2>&-"), "0<&- 1>&- 2>&-"],
)
def test_closed_descriptors_are_no_files_of_the_run(
    closed: str, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, folder = trials(12), tmp_path / "run"
    process = subprocess.Popen(
        command(flags(folder, token_file(tmp_path), *LONG, "--progress", 0), closed),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(),
    )
    while not (folder / "latest.safetensors").exists():
        assert process.poll() is None, f"exit {process.returncode}"
        time.sleep(0.01)
    held = {number: os.readlink(f"/proc/{process.pid}/fd/{number}") for number in range(3)}
    process.send_signal(signal.SIGTERM)
    counted.add(None if process.wait(60) == 75 else f"exit {process.returncode}")
    counted.add(None if set(held.values()) == {"/dev/null"} else f"descriptors {held}")
    for path in folder.iterdir():
        counted.add(f"the signal's text is in {path.name}" if b"SIGTERM" in path.read_bytes() else None)
    counted.finish()


def test_what_is_printed_and_nothing_else_fails_where_it_cannot_be_printed(
    tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """A command whose work is its output: 1 and one line for a full disk, nothing for a reader that had enough."""
    counted, folder = trials(12), tmp_path / "run"
    assert subprocess.run(command(flags(folder, token_file(tmp_path), "--steps", 2), ">/dev/null")).returncode == 0
    for show in (["inspect", str(folder / "latest.safetensors")], ["--help"], ["--version"]):
        full = subprocess.run(command(show, ">/dev/full"), capture_output=True, text=True)
        counted.add(None if full.returncode == 1 else f"{show[0]}: exit {full.returncode}")
        expected = "protomamba: standard output: not written: No space left on device\n"
        counted.add(None if full.stderr == expected else f"{show[0]}: {full.stderr}")
        left = subprocess.run(
            ["bash", "-c", '"$@" | true; exit ${PIPESTATUS[0]}', "bash", *command(show, "")],
            capture_output=True,
            text=True,
        )
        counted.add(None if (left.returncode, left.stderr) == (0, "") else f"{show[0]} | true: {left}")
    counted.finish()
