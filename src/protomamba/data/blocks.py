"""Rows of a table in blocks, and what is said of one that cannot be read: file, row and column."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from protomamba.errors import UserError
from protomamba.schema import nearest

Array = Any  # a pyarrow array


class BadRowError(UserError):
    """One row that cannot be read: its number, and what is wrong with it."""

    def __init__(self, path: Path, row: int, wrong: str, column: str | None = None) -> None:
        place = "" if column is None else f"column {column!r}"
        super().__init__(f"{path}, row {row:,}{place and ', '}{place}: {wrong}")
        self.row, self.reason = row, f"{place}: {wrong}" if place else wrong


# Takes the rows that are left out; without one the first of them is raised.
OnBad = Callable[[BadRowError], None] | None


@dataclass(frozen=True)
class Block:
    """Rows `first` and following of a file (from 1), some of its columns.

    rows: the number of each, where they do not follow on each other.
    """

    path: Path
    first: int
    columns: dict[str, Array]
    rows: npt.NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def number(self, row: int) -> int:
        """The number in the file of a row (from 0) of this block."""
        return self.first + row if self.rows is None else int(self.rows[row])

    def part(self, start: int, stop: int) -> Block:
        """Some of its rows."""
        columns = {name: array[start:stop] for name, array in self.columns.items()}
        return Block(self.path, self.first + start, columns, None if self.rows is None else self.rows[start:stop])

    def refuse(self, row: int, column: str, expected: str, found: object) -> NoReturn:
        """BadRowError naming file, row (from 0 in this block) and column."""
        shown = "nothing" if found is None or found == "" else repr(found)[:60]
        raise BadRowError(self.path, self.number(row), f"expected {expected}, found {shown}", column)


def each_good(block: Block, work: Callable[[Block], None], on_bad: OnBad) -> None:
    """`work` on the rows that it does not refuse by BadRowError, in order; it must do nothing before it refuses."""
    try:
        work(block)
    except BadRowError as error:
        if on_bad is None:
            raise
        if len(block) == 1:
            return on_bad(error)
        half = len(block) // 2
        for part in (block.part(0, half), block.part(half, len(block))):
            each_good(part, work, on_bad)


def refuse_missing(
    path: Path, column: str, names: Sequence[str], flag: str = "", taken: Sequence[str] = ()
) -> NoReturn:
    """UserError naming the columns there are, and of those that are not `taken` the one whose name is nearest."""
    free = [name for name in names if name not in taken]
    shown = ", ".join(names)[:200] or "none"
    advice = f"; name it with {flag}" if flag else ""
    raise UserError(f"{path}: no column {column!r}{nearest(column, free)}: its columns are {shown}{advice}")
