"""From rows to what the model reads: which column is the sequence, which names the row, what is wrong with it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from protomamba.data.dna import INVALID, DnaTokenizer
from protomamba.data.files import SURROGATE
from protomamba.data.tokenizer import Tokenizer
from protomamba.data.vocabulary import UNKNOWN, Vocabulary
from protomamba.errors import UserError
from protomamba.predict.batching import Array
from protomamba.predict.predictor import wrong_step
from protomamba.predict.rows import LINE, Row

# Names that a column of the sequence is looked for by, before the columns are looked at.
USUAL_NAMES = ("tokens", "items", "text", "sequence")
ROW = "row"


@dataclass(frozen=True)
class Columns:
    """The sequence's column and the one that names a row (None: its number), as they are called in the input."""

    sequence: str
    key: str | None

    @property
    def key_name(self) -> str:
        """What the row's name is called in the output."""
        return self.key or ROW


@dataclass(frozen=True)
class Example:
    """One row as the model reads it. raw_bytes: of its text, None where it was no text."""

    key: Any
    sequence: Array
    raw_bytes: int | None = None


@dataclass(frozen=True)
class Skipped:
    """A row that could not be read, and why."""

    row: int
    reason: str


@dataclass
class ExampleReader:
    """Rows -> examples, in order. `skipped` grows as it goes, or the first bad row is a UserError.

    vocab_size: tokens must be below it. tokenizer: makes tokens of text, vocabulary of names; None where rows hold
    tokens. start: a token put before each sequence (the end of a document before a text, the boundary before events).
    channels: of a model of measured values, None for one of tokens. label_column: never taken for the row's name.
    `unknown` counts items that have no token.
    """

    source: str
    vocab_size: int
    tokenizer: Tokenizer | None = None
    start: int | None = None
    sequence_column: str | None = None
    key_column: str | None = None
    skip_bad: bool = False
    vocabulary: Vocabulary | None = None
    channels: int | None = None
    label_column: str | None = None
    columns: Columns | None = None
    skipped: list[Skipped] = field(default_factory=list)
    unknown: int = 0

    def examples(self, rows: Iterable[Row]) -> Iterator[Example]:
        for row in rows:
            try:
                yield self._example(row)
            except _BadRowError as error:
                if not self.skip_bad:
                    place = f"row {row.number:,}{', ' if str(error).startswith('column ') else ': '}"
                    raise UserError(f"{self.source}, {place}{error}; correct it, or use --on-bad-row skip") from None
                self.skipped.append(Skipped(row.number, str(error)))

    def _example(self, row: Row) -> Example:
        if row.error:
            raise _BadRowError(row.error)
        if self.columns is None:
            given = self.sequence_column, self.key_column
            self.columns = choose_columns(self.source, row.fields, *given, label=self.label_column)
        columns = self.columns
        for name in (columns.sequence, columns.key):
            if name is not None and name not in row.fields:
                raise _BadRowError(f"expected a column {name!r}, found {', '.join(row.fields) or 'none'}")
            if name is not None and row.fields[name] is None:
                raise _BadRowError(f"{_column(name)}expected a value, found nothing")
        value = row.fields[columns.sequence]
        broken = SURROGATE.search(value) if isinstance(value, str) and columns.sequence != LINE else None
        if broken:
            raise _BadRowError(f"{_column(columns.sequence)}expected UTF-8 text, found {_byte(broken[0])}")
        key = row.number if columns.key is None else row.fields[columns.key]
        return self._encoded(key, value, columns.sequence)

    def _encoded(self, key: Any, value: Any, column: str) -> Example:
        raw_bytes = None
        if self.tokenizer is not None and isinstance(value, str | bytes):
            sequence, raw_bytes = self._tokenized(self.tokenizer, value, column)
        elif self.vocabulary is not None and isinstance(value, list | str):
            names = value.replace(",", " ").split() if isinstance(value, str) else value
            sequence = self.vocabulary.encode(names)
        else:
            sequence = _numbers(value, column, "text" if self.tokenizer is not None else "a list of tokens")
        self.unknown += int((sequence == UNKNOWN).sum()) if self.vocabulary is not None else 0
        if self.start is not None and sequence.ndim == 1:
            sequence = np.concatenate(([self.start], sequence))
        wrong = wrong_step(sequence, self.vocab_size, self.channels)
        if wrong:
            raise _BadRowError(f"{_column(column)}{wrong}")
        return Example(key, sequence, raw_bytes)

    def _tokenized(self, tokenizer: Tokenizer, value: str | bytes, column: str) -> tuple[Array, int]:
        """Tokens, and how many bytes (bases) they stand for."""
        raw = value.encode("utf-8", errors="surrogateescape") if isinstance(value, str) else value
        try:
            if isinstance(tokenizer, DnaTokenizer) and not (tokenizer.codes(raw) == INVALID).any():
                codes = tokenizer.codes(raw)  # arrays throughout: a record may be a chromosome
                return tokenizer.tokens(codes), len(codes)
            text = value if isinstance(value, str) else raw.decode("utf-8", errors="surrogateescape")
            return np.array(tokenizer.encode(text), dtype=np.int64), len(raw)
        except UserError as error:
            raise _BadRowError(f"{_column(column)}{error}") from None


class _BadRowError(Exception):
    """What is wrong with one row."""


def _column(name: str) -> str:
    """Before what is wrong with a value: its column, where columns have names."""
    return "" if name == LINE else f"column {name!r}: "


def _byte(surrogate: str) -> str:
    """A byte that was no text, or half a pair that JSON escapes spell out."""
    code = ord(surrogate)
    return f"byte 0x{code - 0xDC00:02x}" if 0xDC80 <= code <= 0xDCFF else "half a surrogate pair"


def _numbers(value: Any, column: str, expected: str) -> Array:
    """Tokens as a list, an array or "1 2 3" (also with commas)."""
    if isinstance(value, np.ndarray):
        return value.astype(np.int64) if np.issubdtype(value.dtype, np.integer) else value.astype(np.float32)
    parts = value.replace(",", " ").split() if isinstance(value, str) else value
    if not isinstance(parts, list):
        raise _BadRowError(f"{_column(column)}expected {expected}, found {str(value)[:40]}")
    try:
        return np.array([_token(part) for part in parts], dtype=np.int64)
    except (ValueError, OverflowError):
        wrong = next(part for part in parts if not _is_token(part))
        raise _BadRowError(f"{_column(column)}expected tokens, found {str(wrong)[:40]!r}") from None


def _token(part: Any) -> int:
    if isinstance(part, bool) or not isinstance(part, int | str):
        raise ValueError
    return int(part)


def _is_token(part: Any) -> bool:
    try:
        return -(1 << 63) <= _token(part) < 1 << 63
    except ValueError:
        return False


def choose_columns(
    source: str, fields: dict[str, Any], sequence: str | None, key: str | None, label: str | None = None
) -> Columns:
    """The columns as given, or else found: a usual name, the only list, the only column. UserError where that fails."""
    names = list(fields)
    for given, flag in ((sequence, "--sequence-column"), (key, "--key-column")):
        if given is not None and given not in names:
            raise UserError(f"{source}: {flag} {given}: there is no such column; found {', '.join(names)}")
    sequence = sequence or _find_sequence(source, fields, key)
    plain = [name for name in names if not isinstance(fields[name], list | dict | np.ndarray)]
    others = [name for name in plain if name not in (sequence, label)]
    return Columns(sequence, key or (others[0] if others else None))


def _find_sequence(source: str, fields: dict[str, Any], key: str | None) -> str:
    usual = [name for name in (*USUAL_NAMES, LINE) if name in fields]
    if usual:
        return usual[0]
    names = [name for name in fields if name != key]
    lists = [name for name in names if isinstance(fields[name], list)]
    for candidates in (lists, names):
        if len(candidates) == 1:
            return candidates[0]
    raise UserError(f"{source}: which column is the sequence? Found {', '.join(names)}; name it: --sequence-column")
