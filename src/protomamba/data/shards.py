"""A set of token shards: an immutable description with random access, made from a file, a folder or tokens in memory.

Tokens are read with one `pread` a run of windows, from a file opened for it. A memory map would be no faster at this
size, would count every page touched as resident memory, and would end the process with SIGBUS when a file shrinks under
it; this way a file that shrinks, changes or disappears during training is one clear error, and nothing is held open.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from protomamba.data.files import FileRef, os_message, sha256_of
from protomamba.data.formats import EXTENSIONS, Layout, first_token_at_least
from protomamba.data.index import Indexed, examine
from protomamba.data.manifest import Manifest, read_manifest
from protomamba.data.source import DataInfo, StreamSpec
from protomamba.data.stream import Identity
from protomamba.data.token_stream import TokenStream
from protomamba.data.windows import Batch, Tokens, eval_batches
from protomamba.errors import ConfigError, UserError
from protomamba.words import counted


@dataclass(frozen=True)
class Shard:
    """Tokens `start` to `start + tokens` of one token file (or of an array in memory)."""

    name: str
    indexed: Indexed
    start: int
    tokens: int

    @property
    def where(self) -> str:
        """The path for messages."""
        return str(self.indexed.source.path)

    def identity(self) -> dict[str, int | str]:
        """What must be the same for a run to go on: name, range and checksum of the contents; not place or time."""
        return {"name": self.name, "start": self.start, "tokens": self.tokens, "sha256": self.indexed.source.sha256}


@dataclass(frozen=True)
class ShardSet:
    """Shards in a fixed order. `notes` are lines the user should see, such as a text file that is held in memory."""

    shards: tuple[Shard, ...]
    notes: tuple[str, ...] = ()
    manifest: Manifest | None = None
    # Stamps seen later than at opening and found to have the same contents; it only saves checking them again.
    _restamped: dict[Path, FileRef] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.shards)

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def max_token(self) -> int:
        """The largest token in any of the files (of the whole file where a shard is a part of one)."""
        return max(shard.indexed.max_token for shard in self.shards)

    @property
    def vocab_size(self) -> int:
        """The vocabulary the manifest declares, otherwise the largest token + 1."""
        return self.manifest.vocab_size if self.manifest else self.max_token + 1

    @property
    def info(self) -> DataInfo:
        """The manifest's declarations; without one, only the vocabulary that the tokens need."""
        if self.manifest is None:
            return DataInfo(vocab_size=self.vocab_size, targets=self.tokens)
        return DataInfo(
            vocab_size=self.vocab_size,
            targets=self.tokens,
            eos_token=self.manifest.eos_token,
            tokenizer=self.manifest.tokenizer_json(),
            preset=self.manifest.preset,
            bytes_per_token=self.manifest.bytes_per_token,
        )

    def identity(self) -> Identity:
        """The identities of all shards, in order, for a checkpoint."""
        return [shard.identity() for shard in self.shards]

    def fingerprint(self) -> str:
        """One checksum over `identity()`."""
        return hashlib.sha256(repr([tuple(each.values()) for each in self.identity()]).encode()).hexdigest()

    def read(self, shard: int, start: int, stop: int) -> Tokens:
        """Tokens [start, stop) of a shard as int64. UserError if its file has changed since the set was opened."""
        return self.read_ranges(shard, [(start, stop)])[0]

    def read_ranges(self, shard: int, ranges: Sequence[tuple[int, int]]) -> list[Tokens]:
        """`read` of several ranges of one shard, whose file is opened once."""
        part = self.shards[shard]
        for start, stop in ranges:
            if not 0 <= start <= stop <= part.tokens:
                raise IndexError(f"tokens {start} to {stop} of shard {part.name} with {part.tokens}")
        moved = [(part.start + start, part.start + stop) for start, stop in ranges]
        if part.indexed.data is not None:
            return [part.indexed.data[start:stop].astype(np.int64) for start, stop in moved]
        return self._read_file(part, moved)

    def _read_file(self, part: Shard, ranges: Sequence[tuple[int, int]]) -> list[Tokens]:
        path = part.indexed.store.path
        try:
            descriptor = os.open(path, os.O_RDONLY)
            try:
                self._check_unchanged(part.indexed.store, os.fstat(descriptor))
                return [_pread(descriptor, part, start, stop) for start, stop in ranges]
            finally:
                os.close(descriptor)
        except OSError as error:
            raise UserError(
                f"{path}: can no longer be read: {os_message(error)}; restore it and resume from the checkpoint"
            ) from error

    def _check_unchanged(self, opened: FileRef, status: os.stat_result) -> None:
        known = self._restamped.get(opened.path, opened)
        if known.same_stamp(status):
            return
        if status.st_size != opened.size or sha256_of(opened.path) != opened.sha256:
            raise UserError(
                f"{opened.path}: changed while in use: expected {opened.size:,} bytes of sha256 {opened.sha256[:12]}, "
                f"found {status.st_size:,} other bytes; restore the file and resume from the checkpoint"
            )
        self._restamped[opened.path] = FileRef.of(opened.path, status, opened.sha256)

    def check(self, *, vocab_size: int, classes: int, seq_len: int) -> None:
        """`check_vocab`; a window's length is checked where windows are counted."""
        self.check_vocab(vocab_size)

    def class_counts(self) -> None:
        """Not counted: it would mean reading everything."""

    def check_vocab(self, vocab_size: int) -> None:
        """Raise UserError naming file and offset of the first token outside [0, vocab_size)."""
        for shard in self.shards:
            if shard.indexed.max_token >= vocab_size:
                position, token = self._first_at_least(shard, vocab_size)
                raise UserError(
                    f"{shard.where}, token {position:,}: expected a token below the vocabulary size {vocab_size}, "
                    f"found {token}; correct the file, or train with --vocab-size {shard.indexed.max_token + 1} or more"
                )

    def _first_at_least(self, shard: Shard, bound: int) -> tuple[int, int]:
        indexed = shard.indexed
        if indexed.data is not None:
            position = int(np.flatnonzero(indexed.data >= bound)[0])
            return position, int(indexed.data[position])
        found = first_token_at_least(indexed.store.path, indexed.layout, bound)
        if found is None:
            raise UserError(f"{shard.where}: changed while in use; start again when it is complete")
        return found

    def stream(self, spec: StreamSpec) -> TokenStream:
        """The order of training windows."""
        return TokenStream(
            self,
            batch_size=spec.batch_size,
            seq_len=spec.seq_len,
            seed=spec.seed,
            packed=spec.packed,
            shuffle_shards=spec.shuffle_shards,
            eos_token=spec.eos_token,
            reset_at_eos=spec.reset_at_eos,
        )

    def eval_batches(self, spec: StreamSpec, count: int | None = None) -> Iterator[Batch]:
        """`count` batches of windows, None for all."""
        return eval_batches(
            self, spec.batch_size, spec.seq_len, count, eos_token=spec.eos_token, reset_at_eos=spec.reset_at_eos
        )

    def split(self, val_ratio: float, seed: int = 0) -> tuple[ShardSet, ShardSet]:
        """Training and validation part: the last `val_ratio` of all tokens, in the order of the shards, is held out.

        The tail of the whole set rather than of each shard: only one shard is cut, so small shards are not left with
        tails shorter than a window, and only one text has its end in the other part. No token is in both parts;
        `seed` changes nothing.
        """
        if not 0.0 < val_ratio < 1.0:
            raise ConfigError(f"--val-ratio {val_ratio}: expected more than 0 and less than 1 to hold out a part")
        held_out = round(self.tokens * val_ratio)
        cut = self.tokens - held_out
        train, validation, before = [], [], 0
        for shard in self.shards:
            here = min(max(cut - before, 0), shard.tokens)
            if here:
                train.append(replace(shard, tokens=here))
            if here < shard.tokens:
                validation.append(replace(shard, start=shard.start + here, tokens=shard.tokens - here))
            before += shard.tokens
        if not train or not validation:
            raise UserError(f"{self.tokens:,} tokens are too few to hold out {val_ratio:g} of them; give more tokens")
        return replace(self, shards=tuple(train)), replace(self, shards=tuple(validation))


def _pread(descriptor: int, part: Shard, start: int, stop: int) -> Tokens:
    layout = part.indexed.layout
    width = np.dtype(layout.dtype).itemsize
    data = os.pread(descriptor, (stop - start) * width, layout.offset + start * width)
    if len(data) != (stop - start) * width:
        path = part.indexed.store.path
        raise UserError(f"{path}, token {start:,}: expected {stop - start} tokens, found {len(data) // width}")
    return np.frombuffer(data, dtype=layout.dtype).astype(np.int64)


def infer_vocab(*sets: ShardSet) -> int:
    """The vocabulary size that training and validation sets need together."""
    return max(each.vocab_size for each in sets)


def open_token_file(path: str | Path, cache_dir: Path | None = None) -> ShardSet:
    """Open one .txt, .bin or .npy token file. UserError naming the file and the defect if it is not sound."""
    path = Path(path)
    indexed = _examine(path, cache_dir)
    return _make_set([indexed], _manifest_for(path.parent, path.name))


def open_token_dir(folder: str | Path, ext: str | None = None, cache_dir: Path | None = None) -> ShardSet:
    """Open the shards with extension `ext` directly in a folder, in the order of their names.

    Without `ext` the folder must hold one kind of token file. A `manifest.json` of `protomamba prepare` is checked:
    files, counts and checksums must be the listed ones.
    """
    folder = Path(folder)
    paths = _shard_paths(folder, ext)
    manifest = read_manifest(folder) if paths[0].suffix == ".bin" else None
    if manifest is not None:
        manifest.check_names({path.name for path in paths})
    # Hashing and parsing release the interpreter lock for most of their time.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = list(pool.map(lambda path: _examine(path, cache_dir), paths))
    kinds = {each.layout.kind: each.source.path.name for each in found}
    if len(kinds) > 1:
        listed = ", ".join(f"{name} ({kind})" for kind, name in sorted(kinds.items()))
        raise UserError(
            f"{folder}: mixed layouts: {listed}; expected shards of one layout, a damaged header looks like this"
        )
    return _make_set(found, manifest)


def in_memory(tokens: Sequence[int] | npt.NDArray[Any] | torch.Tensor, name: str = "tokens") -> ShardSet:
    """A set of one shard over tokens in memory: integers >= 0, at least two."""
    data = np.asarray(tokens)
    if data.ndim != 1 or data.dtype.kind not in "iu":
        raise UserError(
            f"{name}: expected a one-dimensional sequence of integers, found {counted(data.ndim, 'dimension')} of "
            f"{data.dtype}"
        )
    if data.size < 2:
        raise UserError(f"{name}: expected at least 2 tokens, found {data.size}")
    if int(data.min()) < 0:
        where = int(np.flatnonzero(data < 0)[0])
        raise UserError(f"{name}, token {where:,}: expected a token >= 0, found {int(data[where])}")
    data = data.astype("<i8")  # a copy, so the set stays what it is
    file = FileRef(Path(name), data.nbytes, 0, 0, hashlib.sha256(data.tobytes()).hexdigest())
    layout = Layout("memory", "<i8", 0, data.size)
    return ShardSet((Shard(name, Indexed(file, file, layout, int(data.max()), 0, data), 0, data.size),))


def _examine(path: Path, cache_dir: Path | None) -> Indexed:
    if path.suffix not in EXTENSIONS and not path.is_dir():
        raise UserError(
            f"{path}: expected a token file ending in {', '.join(EXTENSIONS)}; make one with `protomamba prepare`"
        )
    return examine(path, cache_dir)


def _shard_paths(folder: Path, ext: str | None) -> list[Path]:
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise UserError(f"{folder}: expected a folder of shards: {os_message(error)}") from error
    present = {known: [path for path in files if path.suffix == known] for known in EXTENSIONS}
    present = {known: paths for known, paths in present.items() if paths}
    counts = ", ".join(f"{len(paths)} {known}" for known, paths in present.items()) or "no token files"
    if ext is not None:
        suffix = "." + ext.removeprefix(".")
        if suffix not in EXTENSIONS:
            raise ConfigError(f"--shard-ext {ext}: expected one of {', '.join(each[1:] for each in EXTENSIONS)}")
        if suffix not in present:
            raise UserError(f"{folder}: expected {suffix} shards, found {counts}; choose with --shard-ext")
        return present[suffix]
    if len(present) != 1:
        raise UserError(
            f"{folder}: expected shards of one kind ({', '.join(EXTENSIONS)}), found {counts}; use --shard-ext"
        )
    return next(iter(present.values()))


def _manifest_for(folder: Path, name: str) -> Manifest | None:
    """The folder's manifest if it lists this file."""
    manifest = read_manifest(folder) if name.endswith(".bin") else None
    return manifest if manifest and any(shard.name == name for shard in manifest.shards) else None


def _make_set(found: Sequence[Indexed], manifest: Manifest | None) -> ShardSet:
    notes = tuple(each.note for each in found if each.note)
    headerless = [each for each in found if each.layout.kind == "headerless" and each.layout.dtype == "<u2"]
    if headerless:
        notes += (f"{headerless[0].source.path.name}: no header, read as uint16 (nanoGPT layout)",)
    if manifest is not None:
        for each in found:
            manifest.check_shard(each.source.path, each.layout.tokens, each.source.sha256)
    shards = tuple(Shard(each.source.path.name, each, 0, each.layout.tokens) for each in found)
    return ShardSet(shards, notes, manifest)
