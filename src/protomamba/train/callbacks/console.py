"""What a person sees of a run: the only owner of console formatting.

On a terminal: a progress bar with time left, tokens a second and loss. Elsewhere: one plain line for each logged step,
and never a bar, because a log file keeps every redraw. A stream that breaks costs its text and nothing else.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TextIO, cast

from rich.box import SIMPLE
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from protomamba.output import safe

# Columns in a file or pipe, which tell no width: a table is as wide there as it needs, and no wider.
FILE_WIDTH = 10_000

# Order and format of the fields of a plain line; a field without a value is left out.
_STEP_FIELDS = {
    "loss": "loss {:.4f}",
    "ff_loss": "ff {:.4f}",
    "lr": "lr {:.2e}",
    "grad_norm": "norm {:.3f}",
    "tokens_per_s": "{:,.0f} tokens/s",
    "step_ms": "{:.1f} ms",
}


def rich_console(stream: TextIO | None = None) -> RichConsole:
    """The console of the rich library for `stream` (standard output), of our width, without guesses at markup."""
    # soft_wrap: a line stays a line, however narrow the terminal or the file is taken to be.
    console = RichConsole(file=stream, highlight=False, emoji=False, soft_wrap=True)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = FILE_WIDTH
    return console


class Console:
    """Prints a run to `stream` (standard output). `progress`: True bar, False plain lines, None a bar on a terminal."""

    def __init__(self, stream: TextIO | None = None, *, progress: bool | None = None) -> None:
        self._stream = safe(stream or sys.stdout)
        self._rich = rich_console(cast(TextIO, self._stream))
        self._show_bar = self._rich.is_terminal if progress is None else progress
        self._bar: Progress | None = None
        self._task: Any = None
        self._clock: _Clock | None = None

    def when_lost(self, tell: Callable[[OSError], None] | None) -> None:
        """Call `tell` once, with the error, when the stream takes no more text: see SafeStream."""
        self._stream.when_lost(tell)

    def line(self, text: str) -> None:
        """One line as it is, above the bar if there is one."""
        self._rich.print(escape(text))

    def warn(self, text: str) -> None:
        self._rich.print(f"[yellow]warning: {escape(text)}[/]")

    def header(self, fields: Mapping[str, object]) -> None:
        """The name and value pairs a run begins with, aligned."""
        width = max(map(len, fields), default=0)
        for name, value in fields.items():
            self.line(f"{name:<{width}}  {value}")

    def table(self, columns: Sequence[str], rows: Iterable[Sequence[object]], title: str | None = None) -> None:
        """A table; columns whose cells are all numbers are right-aligned."""
        cells = [list(row) for row in rows]
        table = Table(title=title, title_justify="left", box=SIMPLE)
        for i, name in enumerate(columns):
            numeric = bool(cells) and all(_is_number(row[i]) for row in cells)
            table.add_column(escape(name), justify="right" if numeric else "left", overflow="fold")
        for row in cells:
            table.add_row(*(escape(_cell(value)) for value in row))
        self._rich.print(table)

    def start(self, total_steps: int, done_steps: int = 0) -> None:
        """Begin the training phase: shows the bar, if bars are shown; elsewhere lines tell the time."""
        self._clock = _Clock(total_steps, done_steps, time.monotonic())
        if not self._show_bar:
            return
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(elapsed_when_finished=True),
        )
        self._bar = Progress(*columns, console=self._rich)
        # The steps done before a resume are no work of this process: they must not enter the estimate of the time left.
        self._task = self._bar.add_task("", total=total_steps, completed=done_steps, figures="")
        self._bar.start()

    def step(self, step: int, fields: Mapping[str, Any], *, logged: bool) -> None:
        """After each step: moves the bar, or prints a plain line if the step is a logged one."""
        if self._bar is not None:
            figures = "  ".join(part for key, part in _parts(fields).items() if key in ("loss", "tokens_per_s"))
            self._bar.update(self._task, completed=step, figures=figures)
        elif logged:
            times = [self._clock.told(step, time.monotonic())] if self._clock else []
            self.line("  ".join([f"step {step:>7,}", *_parts(fields).values(), *times]))

    @contextmanager
    def bar(self, what: str) -> Iterator[Callable[[int, int], None]]:
        """A bar for work counted in bytes: call what it yields with (done, total). Nothing is drawn off a terminal."""
        if not self._show_bar:
            yield lambda done, total: None
            return
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn(elapsed_when_finished=True))
        with Progress(*columns, console=self._rich) as progress:
            task = progress.add_task("", total=None)
            yield lambda done, total: progress.update(task, completed=done, total=total)

    def stop(self) -> None:
        """End the training phase; safe to call twice and without `start`."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> Console:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


@dataclass(frozen=True)
class _Clock:
    """When the steps behind `first` began, of `total` there will be."""

    total: int
    first: int
    started: float

    def told(self, step: int, now: float) -> str:
        """How long it took so far, and, at the speed so far, will take; validations and saves are part of both."""
        elapsed = now - self.started
        left = elapsed / max(1, step - self.first) * max(0, self.total - step)
        return f"elapsed {duration(elapsed)}  left {duration(left)}"


def duration(seconds: float) -> str:
    """12s, 3m05s or 2h07m."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    minutes, rest = divmod(whole, 60)
    return f"{minutes}m{rest:02}s" if minutes < 60 else f"{minutes // 60}h{minutes % 60:02}m"


def _parts(fields: Mapping[str, Any]) -> dict[str, str]:
    return {key: form.format(fields[key]) for key, form in _STEP_FIELDS.items() if fields.get(key) is not None}


def _is_number(value: object) -> bool:
    """A number, or one as text that somebody has rounded already."""
    return isinstance(value, int | float) or re.fullmatch(r"-?[\d,]+(\.\d+)?", str(value)) is not None


def _cell(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
