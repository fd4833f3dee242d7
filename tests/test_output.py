"""Streams that break: the work goes on, the loss is remembered and told once."""

from __future__ import annotations

import errno
import io
import os
import threading
from pathlib import Path
from typing import TextIO, cast

import pytest

from protomamba.output import SafeStream, safe, safe_standard_streams
from protomamba.train.callbacks.console import Console


class Refusing(io.StringIO):
    """Takes nothing while `code` is set."""

    code: int | None = errno.ENOSPC

    def write(self, text: str) -> int:
        if self.code is not None:
            raise OSError(self.code, os.strerror(self.code))
        return super().write(text)


@pytest.mark.parametrize("code", [errno.EPIPE, errno.EIO, errno.ENOSPC, errno.EBADF, errno.ECONNRESET, errno.EFBIG])
def test_an_error_is_remembered_and_told_once(code: int) -> None:
    told: list[OSError] = []
    broken = Refusing()
    broken.code = code
    stream = SafeStream(broken)
    stream.when_lost(told.append)
    for _ in range(3):
        assert stream.write("text\n") == 5
    assert [error.errno for error in told] == [code] and stream.lost is told[0]
    later: list[OSError] = []
    stream.when_lost(later.append)
    assert later == told
    stream.when_lost(None)


def test_output_goes_on_when_there_is_room_again() -> None:
    disk = Refusing()
    stream = SafeStream(disk)
    stream.write("lost\n")
    disk.code = None
    stream.write("seen\n")
    assert disk.getvalue() == "seen\n" and stream.lost is not None


def test_a_stream_closed_by_another_is_no_obstacle() -> None:
    closed = io.StringIO()
    closed.close()
    stream = SafeStream(closed)
    stream.write("x")
    stream.flush()
    assert stream.lost is not None and stream.lost.errno == errno.EBADF


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", "\\u2713 \\xe9 \\U0001f40d \\udcff"),
        ("latin-1", "\\u2713 é \\U0001f40d \\udcff"),
        ("utf-8", "✓ é 🐍 \\udcff"),
        ("cp1252", "\\u2713 é \\U0001f40d \\udcff"),
    ],
)
def test_what_an_encoding_lacks_is_written_as_its_escape(encoding: str, shown: str) -> None:
    raw = io.BytesIO()
    stream = SafeStream(io.TextIOWrapper(raw, encoding=encoding))
    stream.write("✓ é 🐍 \udcff\n")
    stream.flush()
    assert raw.getvalue() == f"{shown}\n".encode(encoding) and stream.lost is None


def test_a_pipe_set_not_to_block_loses_nothing_while_its_reader_reads() -> None:
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    text = "".join(f"line {number}\n" for number in range(60_000))
    got: list[bytes] = []

    def read() -> None:
        while block := os.read(reading, 1 << 16):
            got.append(block)

    thread = threading.Thread(target=read)
    with os.fdopen(writing, "w") as file:
        stream = SafeStream(file)
        thread.start()
        for line in text.splitlines(keepends=True):
            stream.write(line)
            stream.flush()
        assert stream.lost is None
    thread.join()
    os.close(reading)
    assert b"".join(got).decode() == text


def test_a_pipe_set_not_to_block_that_nobody_reads_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protomamba.output.PATIENCE_S", 0.01)
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    with os.fdopen(writing, "w") as file:
        stream = SafeStream(file)
        for _ in range(30):
            stream.write("x" * 8_000 + "\n")
            stream.flush()
        assert isinstance(stream.lost, BlockingIOError)
        os.set_blocking(writing, True)
        os.close(reading)
        with pytest.raises(BrokenPipeError):
            file.close()


def test_the_standard_streams_come_back_also_where_there_were_none(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("sys.stdout", None)
        import sys

        with safe_standard_streams() as (out, err):
            assert cast(object, sys.stdout) is out and cast(object, sys.stderr) is err
            assert safe(cast(TextIO, out)) is out
        assert sys.stdout is None


def test_a_broken_file_is_let_go_so_that_the_interpreter_ends_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with open("/dev/full", "w") as full:
        monkeypatch.setattr("sys.stdout", full)
        with safe_standard_streams() as (out, _):
            print("nobody reads this")
        assert out.lost is not None and out.lost.errno == errno.ENOSPC
        full.flush()  # raised before: what it held is gone


def test_a_console_goes_on_over_a_broken_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(Refusing):
        code = errno.EIO

        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    told: list[OSError] = []
    with Console(Terminal(), progress=True) as console:
        console.when_lost(told.append)
        console.header({"a": 1})
        console.start(10)
        for step in range(1, 11):
            console.step(step, {"loss": 1.0}, logged=True)
            console.warn("x")
        console.table(["a"], [[1]])
        with console.bar("reading") as move:
            move(1, 2)
    assert [error.errno for error in told] == [errno.EIO]
