"""Labelled sequences out of tables: a row a sequence, or, with a group column, a row a step of one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.blocks import Block
from protomamba.data.columns import OrderKeys, PromotedError, floats_of, names_of
from protomamba.data.compressed import plain_suffix
from protomamba.data.series import read_npz, read_ts, trimmed
from protomamba.data.tables import expand_columns, read_blocks
from protomamba.data.vocabulary import RESERVED, UNKNOWN
from protomamba.errors import ConfigError, UserError

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class LabelColumns:
    """Where label and sequence stand: one of `text`, `tokens` and `values`; `group` and `order` for a row a step."""

    label: str | None = None
    text: str | None = None
    tokens: str | None = None
    values: tuple[str, ...] = ()
    group: str | None = None
    order: str | None = None

    @property
    def kind(self) -> str:
        """What a step is: text (a byte of it), tokens or vector."""
        return "text" if self.text else "tokens" if self.tokens else "vector"

    def check(self) -> None:
        """ConfigError for what does not go together."""
        given = [f"--{n}" for n in ("text", "tokens", "values") if getattr(self, n)]
        if len(given) > 1:
            raise ConfigError(f"{' and '.join(given)} exclude each other: a sequence is one of them")
        if self.group and self.text:
            raise ConfigError("--group takes --tokens or --values, a step in each row; --text is a whole sequence")
        if self.order and not self.group:
            raise ConfigError("--order orders the rows of a --group COLUMN: give one")


@dataclass
class Names:
    """Tokens of names, given out as they come; a later part may have none that are new."""

    numbers: dict[str, int] = field(default_factory=dict)
    open: bool = True

    def encode(self, names: Sequence[str]) -> Integers:
        if self.open:
            return np.array([self.numbers.setdefault(n, len(self.numbers)) for n in names], np.int64) + RESERVED
        return np.array([self.numbers.get(n, UNKNOWN - RESERVED) for n in names], np.int64) + RESERVED


@dataclass(frozen=True)
class Example:
    """One sequence: where it is, its label as text, and its steps (bytes, tokens, or float32 steps x channels)."""

    path: Path
    row: int
    label: str
    steps: npt.NDArray[Any]

    @property
    def where(self) -> str:
        """For messages: .ts files have lines, the others rows."""
        return f"{self.path}, {'line' if plain_suffix(self.path) == '.ts' else 'row'} {self.row:,}"


def read_examples(paths: Sequence[Path], columns: LabelColumns, names: Names) -> Iterator[Example]:
    """Every sequence of some files. UserError naming file, row and column of what cannot be read."""
    tables = [path for path in paths if plain_suffix(path) not in (".ts", ".npz")]
    if tables and columns.group:
        yield from _by_group(tables, columns, names)
    for path in paths:
        if plain_suffix(path) == ".ts":
            yield from (Example(path, *case) for case in read_ts(path))
        elif plain_suffix(path) == ".npz":
            given = columns.values[0] if columns.values else None
            yield from (Example(path, *case) for case in read_npz(path, given, columns.label))
        elif not columns.group:
            yield from _by_row(path, columns, names)


def _label_column(path: Path, columns: LabelColumns) -> str:
    if columns.label is None or not (columns.text or columns.tokens or columns.values):
        raise ConfigError(f"{path}: name the columns: --label COLUMN and one of --text, --tokens and --values")
    return columns.label


def _by_row(path: Path, columns: LabelColumns, names: Names) -> Iterator[Example]:
    label = _label_column(path, columns)
    values = expand_columns(path, columns.values, "--values")
    wanted = [label, *(each for each in (columns.text, columns.tokens) if each), *values]
    for block in read_blocks(path, list(dict.fromkeys(wanted))):
        labels = names_of(block, label)[0].to_pylist()
        for row, steps in enumerate(_steps_of_rows(block, columns, values, names)):
            yield Example(path, block.number(row), labels[row], steps)


def _steps_of_rows(
    block: Block, columns: LabelColumns, values: Sequence[str], names: Names
) -> Iterator[npt.NDArray[Any]]:
    if values:
        matrix = np.stack([floats_of(block, name) for name in values], axis=1)
        for row in matrix:
            yield trimmed(row[:, None])
        return
    column = columns.text or columns.tokens or ""
    for row, value in enumerate(block.columns[column].to_pylist()):
        if columns.text:
            if not isinstance(value, str) or not value:
                block.refuse(row, column, "a text", value)
            yield np.frombuffer(value.encode("utf-8", "surrogateescape"), dtype=np.uint8).astype(np.int64)
        else:
            words = value if isinstance(value, list) else str("" if value is None else value).replace(",", " ").split()
            if not words or any(word is None or isinstance(word, float) for word in words):
                block.refuse(row, column, "tokens with spaces between them, or a list", value)
            yield names.encode([str(word) for word in words])


def _by_group(paths: Sequence[Path], columns: LabelColumns, names: Names) -> Iterator[Example]:
    """All rows are held, then sorted by group and order; groups come in the order of their first rows."""
    keys = OrderKeys()
    try:
        steps = _Steps.read(paths, columns, names, keys)
    except PromotedError:
        steps = _Steps.read(paths, columns, names, keys)
    order = np.lexsort((steps.order, steps.group))
    edges = np.flatnonzero(np.diff(steps.group[order], prepend=-1, append=steps.group.max(initial=-1) + 1))
    for start, stop in pairwise(edges.tolist()):
        rows = order[start:stop]
        first = int(rows.min())
        other = next((int(row) for row in np.sort(rows) if steps.labels[row] != steps.labels[first]), None)
        if other is not None:
            path, row = steps.place(other)
            raise UserError(
                f"{path}, row {row:,}, column {columns.label!r}: expected {steps.labels[first]!r} as in the group's "
                f"other rows, found {steps.labels[other]!r}"
            )
        yield Example(*steps.place(first), steps.labels[first], steps.values[rows])


@dataclass(frozen=True)
class _Steps:
    """The rows of some tables: group, order, label and value of each."""

    paths: Sequence[Path]
    counts: list[int]  # rows of each
    group: Integers
    order: npt.NDArray[Any]
    labels: list[str]
    values: npt.NDArray[Any]

    def place(self, row: int) -> tuple[Path, int]:
        """File and row, from 1, of a row of all."""
        for path, count in zip(self.paths, self.counts, strict=True):
            if row < count:
                return path, row + 1
            row -= count
        raise IndexError(row)

    @classmethod
    def read(cls, paths: Sequence[Path], columns: LabelColumns, names: Names, keys: OrderKeys) -> _Steps:
        groups: dict[str, int] = {}
        counts, group, order, labels, values = [0] * len(paths), [], [], list[str](), []
        for number, path in enumerate(paths):
            label, wanted = _label_column(path, columns), expand_columns(path, columns.values, "--values")
            read = [str(columns.group), label, *([columns.order] if columns.order else []), *wanted]
            for block in read_blocks(path, list(dict.fromkeys([*read, *([columns.tokens] if columns.tokens else [])]))):
                own = names_of(block, str(columns.group))[0].to_pylist()
                group.append(np.array([groups.setdefault(name, len(groups)) for name in own]))
                order.append(keys.of(block, columns.order) if columns.order else np.zeros(len(block)))
                labels += names_of(block, label)[0].to_pylist()
                values.append(
                    np.stack([floats_of(block, name) for name in wanted], axis=1)
                    if wanted
                    else names.encode(names_of(block, str(columns.tokens))[0].to_pylist())
                )
                counts[number] += len(block)
        if not labels:
            raise UserError(f"{paths[0]}: expected sequences, found no row")
        return cls(paths, counts, np.concatenate(group), np.concatenate(order), labels, np.concatenate(values))
