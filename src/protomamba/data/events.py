"""`prepare events`: a table of events to one sequence of items for each user, in order, however large the table.

Two passes in bounded memory. The first reads the table in blocks, gives items provisional numbers and spreads the rows
over temporary files by a checksum of the user's name (event_buckets.py). The second takes one such file at a time,
sorts its rows by user and order (ties stay in the order of the table) and appends their tokens.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from protomamba.data.event_buckets import (
    EventColumns,
    Integers,
    Progress,
    Spread,
    Users,
    read_bucket,
    spread_events,
    users_of,
)
from protomamba.data.files import os_message, sha256_of
from protomamba.data.filling import Filling, filling
from protomamba.data.formats import TokenWriter
from protomamba.data.order import derive_key, hashed
from protomamba.data.prepared_manifest import PARTS, TOKENS, PreparedManifest, save_arrays
from protomamba.data.vocabulary import RESERVED, UNKNOWN, Vocabulary
from protomamba.errors import ConfigError, UserError
from protomamba.storage import atomic_file
from protomamba.words import counted

SPLITS = ("last", "time", "user")
# Key of the draw of held-out users; it only has to differ from those of the other draws.
_USERS = 9


@dataclass(frozen=True)
class EventOptions:
    """Which columns there are and what is held out: `valid` and `test` are shares of the events or users."""

    group: str
    item: str
    order: str | None = None
    min_count: int = 1
    split: str = "last"
    valid: float = 0.1
    test: float = 0.1

    def check(self) -> None:
        """ConfigError for what cannot be."""
        if self.split not in SPLITS:
            raise ConfigError(f"--split {self.split}: expected one of {', '.join(SPLITS)}")
        if self.min_count < 1:
            raise ConfigError(f"--min-count {self.min_count}: expected an integer >= 1")
        if self.split == "time" and self.order is None:
            raise ConfigError("--split time needs --order COLUMN, the time of each event")
        for name, share in (("--valid-share", self.valid), ("--test-share", self.test)):
            if not 0 < share < 1:
                raise ConfigError(f"{name} {share:g}: expected more than 0 and less than 1")
        if self.valid + self.test >= 1:
            raise ConfigError(f"--valid-share {self.valid:g} and --test-share {self.test:g} leave nothing to train on")

    @property
    def columns(self) -> EventColumns:
        return EventColumns(self.group, self.item, self.order)


def prepare_events(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    options: EventOptions,
    *,
    vocabulary: Vocabulary | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> PreparedManifest:
    """Make a folder of item sequences of tables of events; returns the manifest that is also written.

    `vocabulary`: the items of an earlier folder or run, which keep their tokens; new ones come behind. `progress` is
    called with bytes read and bytes in all. UserError naming file, row and column of what cannot be read.
    """
    options.check()
    paths, folder = [Path(each) for each in inputs], Path(out_dir)
    known = vocabulary.identity if vocabulary else None
    with filling(folder, paths, {"events": vars(options), "seed": seed, "vocabulary": known}) as call:
        for stale in folder.glob(".prepare-*/"):  # of a call that was killed
            shutil.rmtree(stale, ignore_errors=True)
        return call.done or _fill(call, options, vocabulary, seed, progress)


def _fill(
    call: Filling, options: EventOptions, vocabulary: Vocabulary | None, seed: int, progress: Progress | None
) -> PreparedManifest:
    scratch = Path(tempfile.mkdtemp(prefix=".prepare-", dir=call.folder))
    try:
        paths = [file.path for file in call.inputs]
        spread = spread_events(paths, scratch, options.columns, vocabulary, progress)
        call.check_inputs()
        return _Writer(call.folder, spread, options, seed, vocabulary).write(call)
    except OSError as error:
        raise UserError(f"{call.folder}: cannot be written: {os_message(error)}") from error
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


class _Writer:
    """The second pass: tokens, spans of the parts, vocabulary, manifest."""

    def __init__(
        self, folder: Path, spread: Spread, options: EventOptions, seed: int, vocabulary: Vocabulary | None
    ) -> None:
        self.folder, self.spread, self.options, self.seed = folder, spread, options, seed
        self.buckets = [path for path in spread.buckets if path.exists()]
        self.vocabulary, self.token_of = _tokens(spread, options.min_count, vocabulary)
        spread.numbers.clear()  # the largest thing in memory
        self.cuts = self._cuts() if options.split == "time" else (0, 0)

    def _cuts(self) -> tuple[Any, Any]:
        """The times at which validation and test begin: exact quantiles of all events."""
        keys = np.empty(self.spread.rows, dtype=self.spread.order_dtype)
        at = 0
        for path in self.buckets:
            found = read_bucket(path)["order"].to_numpy()
            keys[at : at + len(found)] = found
            at += len(found)
        valid_at = int(len(keys) * (1 - self.options.valid - self.options.test))
        test_at = int(len(keys) * (1 - self.options.test))
        keys.partition((valid_at, test_at))
        return keys[valid_at], keys[test_at]

    def write(self, call: Filling) -> PreparedManifest:
        spans = self._write_tokens()
        if not len(spans["train"]):
            raise UserError(f"--split {self.options.split}: leaves no event to train on; give more, or another --split")
        files = save_arrays(self.folder, {f"spans-{name}": each for name, each in spans.items()})
        files |= save_arrays(self.folder, {f"vocabulary-{k}": v for k, v in self.vocabulary.state().items()})
        files[TOKENS] = sha256_of(self.folder / TOKENS)
        manifest = PreparedManifest(
            self.folder,
            kind="events",
            preset="events",
            plan=call.plan,
            recipe={"kind": "events", **vars(self.options.columns)},
            about=self._about(spans),
            source={"inputs": call.listed, "options": vars(self.options)},
            files=files,
        )
        manifest.write()
        return manifest

    def _write_tokens(self) -> dict[str, Integers]:
        """Append the sequences of every bucket; the spans of each part."""
        dtype = "<u2" if self.vocabulary.size <= 2**16 else "<u4"
        parts: dict[str, list[Integers]] = {name: [] for name in PARTS}
        with atomic_file(self.folder / TOKENS) as file:
            tokens = TokenWriter(file, dtype)
            for path in self.buckets:
                users = users_of(path)
                for name, found in self._spans(users, tokens.tokens):
                    parts[name].append(found)
                tokens.write(self.token_of[users.items])
            tokens.write(np.zeros(1, dtype=np.int64))  # a token file holds two at least
            tokens.finish()
        return {name: np.concatenate(found) for name, found in parts.items()}

    def _spans(self, users: Users, done: int) -> Iterator[tuple[str, Integers]]:
        """First token, first target and end of every sequence, by part; those without a target are left out."""
        stops = done + np.cumsum(users.counts)
        starts = stops - users.counts
        valid, test = self._edges(users)
        edges = {
            "train": (starts, starts + valid),
            "valid": (starts + valid, starts + test),
            "test": (starts + test, stops),
        }
        for name, (first, stop) in edges.items():
            yield name, np.stack((starts, first, stop), axis=1)[stop > first]

    def _edges(self, users: Users) -> tuple[Integers, Integers]:
        """How many events of each user come before validation, and before test."""
        counts = users.counts
        if self.options.split == "last":
            long_enough = counts >= 3
            return np.where(long_enough, counts - 2, counts), np.where(long_enough, counts - 1, counts)
        if self.options.split == "time":
            begin = np.cumsum(counts) - counts
            valid, test = (np.add.reduceat((users.keys < cut).astype(np.int64), begin) for cut in self.cuts)
            return valid, test
        drawn = hashed(users.checksums, derive_key(self.seed, _USERS)) / 2.0**64
        is_test, is_valid = drawn < self.options.test, drawn < self.options.test + self.options.valid
        return np.where(is_valid, 0, counts), np.where(is_test, 0, counts)

    def _about(self, spans: dict[str, Integers]) -> dict[str, Any]:
        unknown = int(self.spread.counts[: len(self.token_of)][self.token_of == UNKNOWN].sum())
        alone = len(spans["train"]) - len(spans["valid"])
        notes = []
        if unknown:
            notes.append(
                f"{unknown:,} of the {self.spread.rows:,} events are of items seen fewer than {self.options.min_count} "
                "times: they are read as unknown and are never targets"
            )
        if self.options.split == "last" and alone:
            notes.append(f"used for training only: {counted(alone, 'sequence')} of fewer than 3 events")
        return {
            "vocab_size": self.vocabulary.size,
            "split": self.options.split,
            "events": self.spread.rows,
            "parts": {
                name: {"sequences": len(each), "targets": int((each[:, 2] - each[:, 1]).sum())}
                for name, each in spans.items()
            },
            "notes": notes,
        }


def _tokens(spread: Spread, min_count: int, known: Vocabulary | None) -> tuple[Vocabulary, Integers]:
    """The vocabulary, the commonest new item first, and the token of each provisional number."""
    names = list(spread.numbers)
    counts = np.zeros(len(names), dtype=np.int64)
    counts[: len(spread.counts)] = spread.counts[: len(names)]
    fresh = np.arange(spread.known, len(names))
    kept = fresh[counts[fresh] >= min_count]
    kept = np.array(sorted(kept.tolist(), key=lambda number: (-counts[number], names[number])), dtype=np.int64)
    token_of = np.full(len(names), UNKNOWN, dtype=np.int64)
    token_of[: spread.known] = np.arange(spread.known) + RESERVED
    token_of[kept] = np.arange(len(kept)) + spread.known + RESERVED
    chosen = [names[number] for number in kept.tolist()]
    integers = spread.integers and all(_is_integer(name) for name in chosen)
    found = known.extended(chosen, integers) if known is not None else Vocabulary.of(chosen, integers)
    if not len(found):
        raise UserError(f"--min-count {min_count}: no item occurs so often; give a smaller one")
    return found, token_of


def _is_integer(name: str) -> bool:
    """Whether a name is a whole number in its usual spelling, so that the number gives the name back."""
    digits = name.removeprefix("-")
    return digits.isdecimal() and digits.isascii() and len(digits) < 19 and str(int(name)) == name
