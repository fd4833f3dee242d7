"""The console: plain lines in a file, a bar on a terminal, text never taken for markup."""

from __future__ import annotations

import io
from typing import Any

import pytest

from protomamba.train.callbacks.console import Console, duration


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run(console: Console) -> None:
    with console:
        console.start(100, done_steps=90)
        for step in range(91, 101):
            figures: dict[str, Any] = {"loss": 1 / step, "lr": 1e-4, "grad_norm": None, "tokens_per_s": 12345.6}
            console.step(step, figures, logged=step % 5 == 0)
        console.stop()


def test_a_file_gets_one_plain_line_for_each_logged_step(monkeypatch: pytest.MonkeyPatch) -> None:
    out, now = io.StringIO(), iter([1000.0, 1070.0, 1135.4])
    monkeypatch.setattr("protomamba.train.callbacks.console.time.monotonic", lambda: next(now))
    run(Console(out))
    assert out.getvalue().splitlines() == [
        "step      95  loss 0.0105  lr 1.00e-04  12,346 tokens/s  elapsed 1m10s  left 1m10s",
        "step     100  loss 0.0100  lr 1.00e-04  12,346 tokens/s  elapsed 2m15s  left 0s",
    ]


def test_times_are_short() -> None:
    assert [duration(each) for each in (0.4, 59.4, 185, 7_620)] == ["0s", "59s", "3m05s", "2h07m"]


def test_a_terminal_gets_a_bar_and_no_step_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    run(Console(out))
    assert "100/100" in out.getvalue() and "12,346 tokens/s" in out.getvalue() and "lr" not in out.getvalue()
    out = Terminal()
    run(Console(out, progress=False))
    assert "step      95" in out.getvalue() and "100/100" not in out.getvalue()


def test_text_is_printed_as_it_is_on_one_line() -> None:
    out = io.StringIO()
    console = Console(out)
    console.line("[bold]not markup[/bold] :smile: " + "x" * 300)
    console.warn("[/]")
    console.header({"threads": 2, "kernels": "native [avx2]"})
    assert out.getvalue().splitlines() == [
        "[bold]not markup[/bold] :smile: " + "x" * 300,
        "warning: [/]",
        "threads  2",
        "kernels  native [avx2]",
    ]


def test_a_table_aligns_numbers_and_keeps_text() -> None:
    out = io.StringIO()
    Console(out).table(["name", "count"], [["[a]", 12345], ["b", 7]], title="parts")
    text = out.getvalue()
    assert "parts" in text and "[a]" in text and "12,345" in text
    lines = [line.rstrip() for line in text.splitlines()]
    assert any(line.endswith("12,345") for line in lines) and any(line.endswith("     7") for line in lines)
