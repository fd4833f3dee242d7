"""Files of text or bytes to a folder of token shards, with a manifest and the tokenizer beside them.

The inputs are cut into the same units of work whatever the number of jobs, encoded by threads and written in order, so
equal inputs give equal bytes. Each shard is written atomically and recorded, with the place in the input at which the
next one begins: a run that was stopped goes on from the last shard. The manifest comes last: with it, all is there.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.claim import PROGRESS_FILE, PrepareLock, check_unchanged
from protomamba.data.documents import Piece, Source, find_sources, grouped, pieces_of
from protomamba.data.files import FileRef, chunks_of, read_json, reference, sha256_of
from protomamba.data.formats import TokenWriter
from protomamba.data.manifest import MANIFEST, Manifest, ShardEntry, read_manifest
from protomamba.data.tokenizer import TOKENIZER_FILE, ByteTokenizer, Tokenizer, load_tokenizer, train_bpe_tokenizer
from protomamba.errors import MALFORMED, ConfigError, UserError
from protomamba.storage import atomic_file, make_folder, remove_stale_temporaries, write_json

Progress = Callable[[int, int], None]


def prepare(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    *,
    format: str = "auto",
    field: str = "text",
    tokenizer: str = "bytes",
    train_bpe: int | None = None,
    shard_tokens: int = 1 << 24,
    jobs: int = 1,
    eos: str = "auto",
    progress: Progress | None = None,
) -> Manifest:
    """Make token shards of files and folders; returns the manifest that is also written.

    `tokenizer` is `bytes` or the path of a `tokenizer.json`; `train_bpe` trains one of that many tokens on the inputs
    instead. `eos` names the token put after each document (`auto`, `none`, a token's text or number). `progress` is
    called with bytes read and bytes in all. A stopped call with the same arguments goes on where it was; a finished one
    returns at once. UserError for inputs that cannot be read as told, and for a folder that holds something else.
    """
    for name, value, least in (("--shard-tokens", shard_tokens, 2), ("--threads", jobs, 1)):
        if value < least:
            raise ConfigError(f"{name} {value}: expected an integer >= {least}")
    sources = find_sources([Path(each) for each in inputs], format)
    folder = Path(out_dir)
    if format == "bytes" and (train_bpe or tokenizer != "bytes"):
        raise ConfigError("--format bytes: bytes that need not be text can only be made tokens by the bytes tokenizer")
    for source in sources:
        if source.path.resolve().is_relative_to(folder.resolve()):
            raise UserError(f"{source.path}: is an input and lies in --out-dir {folder}; choose another --out-dir")
    make_folder(folder)
    with PrepareLock(folder):
        remove_stale_temporaries(folder, _is_ours)
        return _prepare(sources, folder, field, tokenizer, train_bpe, shard_tokens, jobs, eos, progress)


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, PROGRESS_FILE, TOKENIZER_FILE) or (name.startswith("shard-") and name.endswith(".bin"))


def _prepare(
    sources: Sequence[Source],
    folder: Path,
    field: str,
    tokenizer: str,
    train_bpe: int | None,
    shard_tokens: int,
    jobs: int,
    eos: str,
    progress: Progress | None,
) -> Manifest:
    """What `prepare` does once the folder is its own."""
    files = _describe(sources, jobs)
    listed: list[dict[str, Any]] = [
        {"name": source.name, "format": source.format, "bytes": file.size, "sha256": file.sha256}
        for source, file in zip(sources, files, strict=True)
    ]
    chosen = f"bpe {train_bpe}" if train_bpe else tokenizer if tokenizer == "bytes" else sha256_of(Path(tokenizer))
    plan = _checksum([listed, field, chosen, shard_tokens, eos])
    state = _open_folder(folder, plan)
    if isinstance(state, Manifest):
        return state
    encoder = _tokenizer(folder, state, tokenizer, train_bpe, eos, sources, field)
    dtype = "uint16" if encoder.vocab_size <= 2**16 else "uint32"
    writer = _ShardWriter(folder, state, dtype, shard_tokens)
    total = sum(entry["bytes"] for entry in listed)
    for unit in _encoded(_groups(sources, files, field), encoder, jobs, writer.first_unit):
        writer.add(unit)
        if progress:
            progress(unit.read, total)
    writer.finish()
    made_of = {"plan": plan, "inputs": listed, "documents": writer.documents}
    return _write_manifest(folder, state, dtype, encoder, made_of, writer.raw_bytes)


def _describe(sources: Sequence[Source], jobs: int) -> list[FileRef]:
    with ThreadPoolExecutor(jobs) as pool:
        return list(pool.map(lambda source: reference(source.path), sources))


def _checksum(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@dataclass
class _State:
    """What a stopped run has done: its plan, and each shard with the unit and token at which the next begins."""

    plan: str
    shards: list[ShardEntry] = field(default_factory=list)
    next_places: list[tuple[int, int]] = field(default_factory=list)

    def write(self, folder: Path) -> None:
        shards = [asdict(shard) for shard in self.shards]
        state = {"plan": self.plan, "shards": shards, "next_places": self.next_places}
        write_json(folder / PROGRESS_FILE, state, sort_keys=True)


def _open_folder(folder: Path, plan: str) -> _State | Manifest:
    """The finished manifest, the state to go on from, or a new one. UserError if the folder is in other use."""
    other = f"{folder}: holds data made from other inputs or with other options; choose an empty --out-dir"
    manifest = read_manifest(folder)
    if manifest is not None:
        if manifest.source.get("plan") != plan:
            raise UserError(other)
        for shard in manifest.shards:
            manifest.check_shard(folder / shard.name, shard.tokens, sha256_of(folder / shard.name))
        (folder / PROGRESS_FILE).unlink(missing_ok=True)  # left by a kill right behind the manifest
        return manifest
    if (folder / PROGRESS_FILE).is_file() and not (folder / MANIFEST).exists():
        return _load_state(folder, plan, other)
    if (folder / MANIFEST).exists() or any(folder.glob("shard-*.bin")):
        raise UserError(other)
    state = _State(plan)
    state.write(folder)
    return state


def _load_state(folder: Path, plan: str, other: str) -> _State:
    body = read_json(folder / PROGRESS_FILE)
    state = _State(plan)
    if body.get("plan") != plan:
        if body.get("shards"):
            raise UserError(other)
        return state  # a call that failed before its first shard: nothing of it is worth keeping
    for shard, place in _done(folder / PROGRESS_FILE, body):
        path = folder / shard.name
        if not path.is_file() or sha256_of(path) != shard.sha256:
            break  # made again, and all after it
        state.shards.append(shard)
        state.next_places.append(place)
    return state


def _done(path: Path, body: Mapping[str, Any]) -> list[tuple[ShardEntry, tuple[int, int]]]:
    """The finished shards, each with where the next begins. UserError where the file is damaged."""
    try:
        pairs = zip(body["shards"], body["next_places"], strict=True)
        return [(ShardEntry(**entry), (int(unit), int(token))) for entry, (unit, token) in pairs]
    except MALFORMED as error:
        raise UserError(f"{path}: damaged: {error}; remove the folder and make it again") from error


def _tokenizer(
    folder: Path, state: _State, name: str, train_bpe: int | None, eos: str, sources: Sequence[Source], field: str
) -> Tokenizer:
    """The tokenizer, copied into the folder; one trained by a run that was stopped is used again."""
    path = folder / TOKENIZER_FILE
    if train_bpe is None:
        tokenizer = load_tokenizer(name, eos)
        if name != "bytes":
            _copy(Path(name), path)
        return tokenizer
    if name != "bytes":
        raise ConfigError("--train-bpe makes a tokenizer and --tokenizer names one: give one of them")
    if not (state.shards and path.is_file()):
        texts = (piece.data.decode("utf-8", errors="replace") for s in sources for piece in pieces_of(s, field))
        with atomic_file(path) as file:
            file.write(train_bpe_tokenizer(texts, train_bpe).encode())
    return load_tokenizer(str(path), eos)


def _copy(source: Path, target: Path) -> None:
    with atomic_file(target) as file:
        for block in chunks_of(source):
            file.write(block)


@dataclass(frozen=True)
class _Unit:
    """One unit of work: its number, tokens, the documents that end in it, bytes of text, input bytes read after it."""

    number: int
    tokens: npt.NDArray[np.uint32]
    documents: int
    raw_bytes: int
    read: int


def _groups(sources: Sequence[Source], files: Sequence[FileRef], field: str) -> Iterator[tuple[list[Piece], int]]:
    """Units of work, and the bytes of all inputs that are read after each. UserError where an input has changed."""
    before = 0
    for source, file in zip(sources, files, strict=True):
        for group in grouped(pieces_of(source, field)):
            check_unchanged(source.path, file)
            yield group, before + group[-1].read
        check_unchanged(source.path, file)  # one cut to nothing yields no group
        before += file.size


def _encoded(groups: Iterable[tuple[list[Piece], int]], tokenizer: Tokenizer, jobs: int, first: int) -> Iterator[_Unit]:
    """The units in order, encoded by `jobs` threads, at most two ahead each; those before `first` are only read."""

    def encode(number: int, group: list[Piece], read: int) -> _Unit:
        tokens = np.empty(0, dtype=np.uint32) if number < first else _encode(group, tokenizer)
        raw_bytes = sum(len(piece.data) for piece in group)
        return _Unit(number, tokens, sum(piece.ends for piece in group), raw_bytes, read)

    waiting: deque[Future[_Unit]] = deque()
    with _no_inner_threads(), ThreadPoolExecutor(jobs) as pool:
        for number, (group, read) in enumerate(groups):
            waiting.append(pool.submit(encode, number, group, read))
            if len(waiting) > 2 * jobs:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


@contextlib.contextmanager
def _no_inner_threads() -> Iterator[None]:
    """Keep the tokenizers library to the calling thread, so that --threads is what it says."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _encode(group: Sequence[Piece], tokenizer: Tokenizer) -> npt.NDArray[np.uint32]:
    nothing = np.empty(0, dtype=np.uint32)
    eos = nothing if tokenizer.eos_token is None else np.array([tokenizer.eos_token], dtype=np.uint32)
    parts: Iterable[npt.NDArray[Any]]
    if isinstance(tokenizer, ByteTokenizer):
        parts = (np.frombuffer(piece.data, dtype=np.uint8) for piece in group)
    else:
        # The batch call, also for one text: it is the one that releases the interpreter lock.
        encoded = tokenizer.encode_batch([piece.data.decode("utf-8") for piece in group])
        parts = (np.array(tokens, dtype=np.uint32) for tokens in encoded)
    ends = [eos if piece.ends else nothing for piece in group]
    return np.concatenate([array for pair in zip(parts, ends, strict=True) for array in pair])


class _ShardWriter:
    """Cuts the tokens of units into shards. Every shard has `shard_tokens`, the last from a tenth to 1.1 times that.

    A shard is cut only when a tenth more is there, so that none is left with a token or two.
    """

    def __init__(self, folder: Path, state: _State, dtype: str, shard_tokens: int) -> None:
        self._folder, self._state, self._dtype, self._size = folder, state, dtype, shard_tokens
        self._spare = max(2, shard_tokens // 10)
        self._parts: deque[tuple[int, int, npt.NDArray[np.uint32]]] = deque()  # unit, place in it, tokens
        self._held = 0
        self.first_unit, self._skip = state.next_places[-1] if state.next_places else (0, 0)
        self.documents = self.raw_bytes = 0

    def add(self, unit: _Unit) -> None:
        """Take the tokens of the next unit and write the shards they fill."""
        self.documents += unit.documents
        self.raw_bytes += unit.raw_bytes
        skip = self._skip if unit.number == self.first_unit else 0
        if unit.number >= self.first_unit and unit.tokens.size > skip:
            self._parts.append((unit.number, skip, unit.tokens[skip:]))
            self._held += unit.tokens.size - skip
        while self._held >= self._size + self._spare:
            self._write(self._size)

    def finish(self) -> None:
        """Write what is left as the last shard."""
        if self._held:
            self._write(self._held)
        if sum(shard.tokens for shard in self._state.shards) < 2:
            raise UserError(f"{self._folder}: the inputs hold fewer than 2 tokens; nothing to train on")

    def _write(self, count: int) -> None:
        path = self._folder / f"shard-{len(self._state.shards):05d}.bin"
        next_place = (0, 0)
        with atomic_file(path) as file:
            writer = TokenWriter(file, self._dtype)
            while count:
                number, place, tokens = self._parts.popleft()
                used = tokens[:count]
                writer.write(used)
                count -= used.size
                self._held -= used.size
                next_place = (number, place + used.size)
                if used.size < tokens.size:
                    self._parts.appendleft((number, place + used.size, tokens[used.size :]))
            writer.finish()
        written = reference(path)
        entry = ShardEntry(path.name, writer.tokens, written.size, writer.max_token, written.sha256)
        self._state.shards.append(entry)
        self._state.next_places.append(next_place)
        self._state.write(self._folder)


def _write_manifest(
    folder: Path, state: _State, dtype: str, tokenizer: Tokenizer, source: dict[str, Any], raw_bytes: int
) -> Manifest:
    described = {"kind": tokenizer.kind, "identity": tokenizer.identity}
    manifest = Manifest(
        folder,
        dtype,
        tokenizer.vocab_size,
        tokenizer.eos_token,
        described,
        source,
        tuple(state.shards),
        preset="bytes" if isinstance(tokenizer, ByteTokenizer) else "text",
        raw_bytes=raw_bytes,
    )
    for stale in {path.name for path in folder.glob("shard-*.bin")} - {shard.name for shard in state.shards}:
        (folder / stale).unlink()  # of a stopped run, after a shard that was damaged since
    manifest.write()
    (folder / PROGRESS_FILE).unlink()
    return manifest
