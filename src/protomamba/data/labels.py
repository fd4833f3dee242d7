"""Labelled sequences: a file of tokens, a line a sequence, and beside it a file of labels.

    tokens .txt   integers, a line a sequence              labels .txt   a line a sequence: one label for the whole of
                                                                         it, or one for each token; -100 = none
    tokens .npy   N x L integers, a row a sequence         labels .npy   N or N x L integers

A label for the whole stands at the sequence's last token, where a causal model has read all of it. All of it is held in
memory: 8 bytes a token.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from protomamba.data.arrays import load_npy
from protomamba.data.files import FileRef, os_message, reference
from protomamba.data.labelled_stream import LabelledStream, labelled_eval_batches
from protomamba.data.order import derive_key, shuffled
from protomamba.data.source import DataInfo, StreamSpec
from protomamba.data.stream import Identity
from protomamba.data.text import MAX_TOKEN, parse_block
from protomamba.data.windows import Batch
from protomamba.errors import ConfigError, UserError
from protomamba.words import counted

IGNORED = -100
MAX_CLASSES = 16_777_216
# Key of the draw of held-out sequences; it only has to differ from those of the orders.
_HELD_OUT = 4
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class _Rows:
    """The integers of a file and how many stand in each of its rows (lines)."""

    file: FileRef
    values: npt.NDArray[Any]
    counts: Integers

    @cached_property
    def starts(self) -> Integers:
        """Where each row starts among the values, and where the last one ends."""
        return np.concatenate(([0], np.cumsum(self.counts)))

    def where(self, row: int) -> str:
        """A row for messages, counted as editors count lines and as numpy counts rows."""
        return f"{self.file.path}, " + (f"row {row}" if self.file.path.suffix == ".npy" else f"line {row + 1}")


@dataclass(frozen=True)
class LabelledSequences:
    """Sequences `chosen` of a file, with a label or IGNORED at every token."""

    source: _Rows
    labels: npt.NDArray[np.int32]  # one for each token of the file
    label_source: _Rows
    chosen: Integers
    notes: tuple[str, ...] = ()  # what the user should know
    about: DataInfo | None = None  # what `prepare` knows; without it, what the files themselves say

    def __len__(self) -> int:
        return len(self.chosen)

    @property
    def max_token(self) -> int:
        """The largest token of the file."""
        return int(self.source.values.max())

    @property
    def max_label(self) -> int:
        """The largest label of the file."""
        return int(self.labels.max())

    @property
    def lengths(self) -> Integers:
        """Tokens of each sequence."""
        return self.source.counts[self.chosen]

    @property
    def info(self) -> DataInfo:
        """What `prepare` said, or vocabulary and classes as the largest token and label of the two files need them."""
        about = self.about or DataInfo(vocab_size=self.max_token + 1, n_class=self.max_label + 1)
        usual = int(np.quantile(self.source.counts, 0.95, method="higher"))
        return replace(
            about, longest=int(self.source.counts.max()), usual=usual, targets=int(self.class_counts().sum())
        )

    def class_counts(self) -> Integers:
        """How often each class is the target of the chosen sequences."""
        in_part = np.zeros(len(self.source.counts), dtype=bool)
        in_part[self.chosen] = True
        labels = self.labels[np.repeat(in_part, self.source.counts)]
        classes = self.about.n_class if self.about and self.about.n_class else self.max_label + 1
        return np.bincount(labels[labels >= 0], minlength=classes)

    def stream(self, spec: StreamSpec) -> LabelledStream:
        """All sequences in an order drawn anew each epoch."""
        return LabelledStream(self, batch_size=spec.batch_size, seed=spec.seed)

    def eval_batches(self, spec: StreamSpec, count: int | None = None) -> Iterator[Batch]:
        """`count` batches of sequences, None for all."""
        return labelled_eval_batches(self, spec.batch_size, count)

    def identity(self) -> Identity:
        """The two files for a checkpoint: names, sizes and checksums of their contents, not the place."""
        return [
            {"name": rows.file.path.name, "start": 0, "tokens": len(rows.values), "sha256": rows.file.sha256}
            for rows in (self.source, self.label_source)
        ]

    def fingerprint(self) -> str:
        """One checksum over `identity()` and which sequences were chosen."""
        files = repr([tuple(each.values()) for each in self.identity()]).encode()
        return hashlib.sha256(files + self.chosen.astype("<i8").tobytes()).hexdigest()

    def read(self, places: Integers) -> tuple[npt.NDArray[Any], Integers]:
        """Tokens and labels of the sequences at `places`, B x (longest of them); 0 and IGNORED behind shorter ones.

        Real values are float32 B x L x C instead of tokens, NaN behind shorter ones.
        """
        rows, values = self.chosen[places], self.source.values
        shape = (len(rows), int(self.source.counts[rows].max()))
        is_vector = values.ndim == 2
        tokens_BL: npt.NDArray[Any] = (
            np.full((*shape, values.shape[1]), np.nan, dtype=np.float32) if is_vector else np.zeros(shape, np.int64)
        )
        labels_BL = np.full(shape, IGNORED, dtype=np.int64)
        starts = self.source.starts
        for number, row in enumerate(rows.tolist()):
            part = slice(starts[row], starts[row + 1])
            tokens_BL[number, : part.stop - part.start] = self.source.values[part]
            labels_BL[number, : part.stop - part.start] = self.labels[part]
        return tokens_BL, labels_BL

    def split(self, val_ratio: float, seed: int) -> tuple[LabelledSequences, LabelledSequences]:
        """Training and validation part: `val_ratio` of the sequences, drawn by `seed`, is held out.

        Drawn, not the tail: files of labelled sequences are often sorted by class. UserError if they are too few.
        """
        order = shuffled(len(self), derive_key(seed, _HELD_OUT))
        held_out = round(len(self) * val_ratio)
        if not 0 < held_out < len(self):
            files = "prepare labels --valid FILE" if self.about else "--val-token-file and --val-label-file"
            raise UserError(
                f"{self.source.file.path}: {counted(len(self), 'sequence')}, too few to hold out {val_ratio:g} of "
                f"them; give more, another --val-ratio (0 holds out none), or {files}"
            )
        training, validation = np.sort(order[held_out:]), np.sort(order[:held_out])
        note = f"held out: {held_out:,} of the {counted(len(self), 'sequence')}, drawn by --seed"
        return (
            replace(self, chosen=self.chosen[training], notes=(note,)),
            replace(self, chosen=self.chosen[validation]),
        )

    def check(self, *, vocab_size: int, classes: int, seq_len: int) -> None:
        """UserError naming file and line of the first token or label out of range, or sequence too long."""
        longest = int(self.source.counts.max())
        if longest > seq_len:
            row = int(np.flatnonzero(self.source.counts > seq_len)[0])
            raise UserError(
                f"{self.source.where(row)}: expected at most --seq-len {seq_len} tokens, found "
                f"{self.source.counts[row]}; the longest sequence has {longest}: use --seq-len {longest}"
            )
        if self.source.values.ndim == 1 and self.max_token >= vocab_size:
            row, token = self._first(self.source.values >= vocab_size, self.source.values)
            raise UserError(
                f"{self.source.where(row)}: expected tokens below the vocabulary size {vocab_size}, found {token}; "
                f"correct the file, or train with --vocab-size {self.max_token + 1} or more"
            )
        if self.max_label >= classes:
            row, label = self._first(self.labels >= classes, self.labels)
            raise UserError(
                f"{self.label_source.where(row)}: expected labels below the number of classes {classes}, found "
                f"{label}; use --n-class {self.max_label + 1} or more, or correct the file"
            )

    def _first(self, wrong: npt.NDArray[np.bool_], values: npt.NDArray[Any]) -> tuple[int, int]:
        place = int(np.flatnonzero(wrong)[0])
        return int(np.searchsorted(self.source.starts, place, side="right")) - 1, int(values[place])


def open_labelled(token_file: str | Path, label_file: str | Path) -> LabelledSequences:
    """Read sequences and their labels. UserError naming file and line of the first defect."""
    tokens, labels = _read(Path(token_file), _token_lines, (2,)), _read(Path(label_file), _label_lines, (1, 2))
    _check_tokens(tokens)
    if len(tokens.counts) != len(labels.counts):
        raise UserError(
            f"{labels.file.path}: expected labels for the {len(tokens.counts):,} sequences of "
            f"{tokens.file.path}, found {len(labels.counts):,} lines; the two files belong line by line"
        )
    _check_labels(labels)
    at_last = (labels.counts == 1).all()
    if not at_last and (wrong := np.flatnonzero(labels.counts != tokens.counts)).size:
        row = int(wrong[0])
        raise UserError(
            f"{labels.where(row)}: expected {tokens.counts[row]} labels, one for each token of "
            f"{tokens.file.path.name}, found {labels.counts[row]} (or give every line one label for the whole)"
        )
    spread = np.full(len(tokens.values), IGNORED, dtype=np.int32)
    spread[tokens.starts[1:] - 1 if at_last else slice(None)] = labels.values
    return LabelledSequences(tokens, spread, labels, np.arange(len(tokens.counts)))


def from_arrays(
    folder: Path,
    part: str,
    arrays: tuple[npt.NDArray[Any], Integers, npt.NDArray[np.int32]],
    about: DataInfo,
    notes: tuple[str, ...] = (),
) -> LabelledSequences:
    """A part of a folder of `prepare labels`: its values, lengths and labels, which stand at the last steps."""
    values, lengths, labels = arrays
    steps = _Rows(reference(folder / f"{part}-values.npy"), values, lengths)
    given = _Rows(reference(folder / f"{part}-labels.npy"), labels, np.ones(len(labels), dtype=np.int64))
    spread = np.full(len(values), IGNORED, dtype=np.int32)
    spread[steps.starts[1:] - 1] = labels
    return LabelledSequences(steps, spread, given, np.arange(len(lengths)), notes, about)


def _check_tokens(tokens: _Rows) -> None:
    path = tokens.file.path
    if not tokens.counts.size:
        raise UserError(f"{path}: holds no token; expected one sequence per line")
    if (empty := np.flatnonzero(tokens.counts == 0)).size:
        raise UserError(f"{tokens.where(int(empty[0]))}: expected the tokens of a sequence, found an empty line")
    if (
        int(tokens.values.min()) < 0 or int(tokens.values.max()) > MAX_TOKEN
    ):  # an array; text was checked as it was read
        place = int(np.flatnonzero((tokens.values < 0) | (tokens.values > MAX_TOKEN))[0])
        row = int(np.searchsorted(tokens.starts, place, side="right")) - 1
        raise UserError(f"{tokens.where(row)}: expected tokens from 0 to {MAX_TOKEN}, found {tokens.values[place]}")


def _check_labels(labels: _Rows) -> None:
    wrong = ((labels.values < 0) & (labels.values != IGNORED)) | (labels.values >= MAX_CLASSES)
    if (places := np.flatnonzero(wrong)).size:
        row = int(np.searchsorted(labels.starts, places[0], side="right")) - 1
        _refuse_label(labels.where(row), str(labels.values[places[0]]))
    if not (labels.values >= 0).any():
        raise UserError(f"{labels.file.path}: every label is {IGNORED}, so there is nothing to learn")


def _refuse_label(where: str, found: str) -> NoReturn:
    raise UserError(
        f"{where}: expected labels from 0 to {MAX_CLASSES - 1:,}, or {IGNORED} for none, found {found[:40]}"
    )


def _read(
    path: Path,
    lines: Callable[[Path, bytes], tuple[npt.NDArray[Any], Integers]],
    dimensions: tuple[int, ...],
) -> _Rows:
    """A text through `lines`, or an array of one of `dimensions`."""
    file = reference(path)
    try:
        if path.suffix == ".npy":
            values, counts = _array_rows(path, dimensions)
        elif path.suffix == ".txt":
            values, counts = lines(path, path.read_bytes())
        else:
            raise ConfigError(f"{path}: expected .txt, a line a sequence, or .npy, a row a sequence, with --label-file")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}") from error
    return _Rows(file, values, counts)


def _array_rows(path: Path, dimensions: tuple[int, ...]) -> tuple[npt.NDArray[Any], Integers]:
    array = load_npy(path)
    if array.dtype.kind not in "iu" or array.ndim not in dimensions or not array.size:
        shape = " x ".join(map(str, array.shape)) or "none"
        raise UserError(
            f"{path}: expected integers in {' or '.join(map(str, dimensions))} dimensions, a row a "
            f"sequence, found {array.dtype} of shape {shape}"
        )
    return array.reshape(-1), np.full(len(array), array[0].size, dtype=np.int64)


def _token_lines(path: Path, text: bytes) -> tuple[npt.NDArray[Any], Integers]:
    """The integers of a text and how many stand in each line; empty lines at the end do not count."""
    values = parse_block(path, 0, text)
    if not values.size:
        return values, np.empty(0, dtype=np.int64)
    characters = np.frombuffer(b" " + text, dtype=np.uint8)
    is_space = characters <= 32  # only digits and white space are there
    words = np.flatnonzero(is_space[:-1] & ~is_space[1:])
    return values, np.bincount(np.searchsorted(np.flatnonzero(characters[1:] == 10), words))


def _label_lines(path: Path, text: bytes) -> tuple[Integers, Integers]:
    """The labels of a text and how many stand in each line."""
    lines = [line.split() for line in text.rstrip().split(b"\n")] if text.strip() else []
    values: list[int] = []
    for number, words in enumerate(lines, 1):
        if not words:
            raise UserError(f"{path}, line {number}: expected a label, found an empty line ({IGNORED} is no label)")
        for word in words:
            if not (word.isdigit() and len(word) < 10) and word != b"-100":
                _refuse_label(f"{path}, line {number}", repr(word.decode("utf-8", "replace")))
            values.append(int(word))
    return np.array(values, dtype=np.int64), np.array([len(words) for words in lines], dtype=np.int64)
