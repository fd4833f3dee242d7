"""The layouts of token files: how each is recognised, checked and written.

    protomamba .bin   256-byte header (magic, version, bytes a token, count), then little-endian uint16 or uint32
    llm.c .bin        256 int32 of header (magic 20240520: uint16, 20240801: uint32; version; count), then tokens
    nanoGPT .bin      no header, uint16; or any headerless file whose `<name>.json` says {"dtype": "uint32"}
    .npy              one-dimensional integer array of any width
    .txt              whitespace-separated integers (text.py)

A description (`Layout`) costs one small read; `scan` reads a file once for its checksum and its largest token.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from protomamba.data.arrays import read_npy_header
from protomamba.data.files import CHUNK_BYTES, FileRef, check_regular_file, chunks_of, os_message, read_json
from protomamba.data.text import MAX_TOKEN
from protomamba.errors import UserError
from protomamba.words import counted

MAGIC = b"PMTOKENS"
VERSION = 1
HEADER = struct.Struct("<8sIIQ")
HEADER_BYTES = 256
LLMC_HEADER_BYTES = 1024
# karpathy/llm.c, dev/data/data_common.py: magic -> (version, dtype)
LLMC_LAYOUTS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}
LLMC_NOT_TOKENS = {20240522: "an llm.c evaluation file (questions and answers)"}
SIDECAR_DTYPES = {"uint16": "<u2", "uint32": "<u4"}
EXTENSIONS = (".bin", ".npy", ".txt")


@dataclass(frozen=True)
class Layout:
    """Where the tokens of a file stand: `tokens` of numpy `dtype`, from byte `offset` on."""

    kind: str  # "protomamba", "llm.c", "headerless", "npy"
    dtype: str
    offset: int
    tokens: int


@dataclass(frozen=True)
class Scan:
    """A file that has been read to its end: identity, layout and largest token."""

    file: FileRef
    layout: Layout
    max_token: int


def read_layout(path: Path) -> Layout:
    """Recognise a binary token file. UserError if it is damaged, cut short, or its width cannot be known."""
    size = check_regular_file(path).st_size
    if size == 0:
        raise UserError(f"{path}: the file is empty; expected at least 2 tokens")
    try:
        with path.open("rb") as file:
            layout = _npy_layout(path, file) if path.suffix == ".npy" else _bin_layout(path, file.read(1024), size)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}") from error
    width = np.dtype(layout.dtype).itemsize
    expected = layout.offset + layout.tokens * width
    if expected != size:
        state = "cut short" if size < expected else "longer than it says"
        raise UserError(
            f"{path}: {state}: its header promises {layout.tokens:,} tokens of {width} bytes, {expected:,} bytes in "
            f"all; found {size:,} bytes; copy or make the file again"
        )
    check_token_count(path, layout.tokens)
    return layout


def check_token_count(path: Path, tokens: int) -> None:
    """A file with fewer than two tokens has nothing to predict."""
    if tokens < 2:
        found = "no token" if tokens == 0 else "one token"
        raise UserError(f"{path}: holds {found}; expected at least 2 (a token and the one to predict)")


def _bin_layout(path: Path, head: bytes, size: int) -> Layout:
    sidecar = _sidecar_dtype(path)
    layout = _headed_layout(path, head)
    if layout is None:
        return _headerless_layout(path, size, sidecar or "<u2")
    if sidecar not in (None, layout.dtype):
        raise UserError(
            f"{path}: its header says {layout.dtype}, {_sidecar(path).name} says {sidecar}; remove the wrong one"
        )
    return layout


def _headed_layout(path: Path, head: bytes) -> Layout | None:
    if head.startswith(MAGIC):
        if len(head) < HEADER_BYTES:
            raise UserError(f"{path}: cut short: found {len(head)} bytes of a {HEADER_BYTES}-byte header")
        _, version, width, tokens = HEADER.unpack_from(head)
        if version != VERSION or width not in (2, 4) or any(head[HEADER.size : HEADER_BYTES]):
            raise UserError(
                f"{path}: unknown header (version {version}, {width} bytes a token); expected version {VERSION} with "
                "2 or 4: the file is damaged or of a newer protomamba"
            )
        return Layout("protomamba", f"<u{width}", HEADER_BYTES, tokens)
    magic, version, tokens = struct.unpack_from("<iii", head) if len(head) >= 12 else (0, 0, 0)
    if magic in LLMC_NOT_TOKENS:
        raise UserError(f"{path}: expected tokens, found {LLMC_NOT_TOKENS[magic]}")
    if magic not in LLMC_LAYOUTS:
        return None
    known_version, dtype = LLMC_LAYOUTS[magic]
    if version != known_version or tokens < 0:
        raise UserError(
            f"{path}: llm.c header with version {version}, {tokens} tokens; expected version {known_version}"
        )
    return Layout("llm.c", dtype, LLMC_HEADER_BYTES, tokens)


def _headerless_layout(path: Path, size: int, dtype: str) -> Layout:
    width = np.dtype(dtype).itemsize
    if size % width:
        raise UserError(
            f"{path}: {size:,} bytes is not a whole number of {width}-byte tokens (no header found, so read as plain "
            f'{np.dtype(dtype).name}); the file is cut short, or say {{"dtype": ...}} in {_sidecar(path).name}'
        )
    return Layout("headerless", dtype, 0, size // width)


def _sidecar(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _sidecar_dtype(path: Path) -> str | None:
    sidecar = _sidecar(path)
    if not sidecar.exists():
        return None
    name = read_json(sidecar).get("dtype")
    if not isinstance(name, str) or name not in SIDECAR_DTYPES:
        raise UserError(f'{sidecar}, key "dtype": expected "uint16" or "uint32", found {name!r}')
    return SIDECAR_DTYPES[name]


def _npy_layout(path: Path, file: IO[bytes]) -> Layout:
    shape, dtype = read_npy_header(path, file)
    if dtype.kind not in "iu" or len(shape) != 1:
        raise UserError(
            f"{path}: expected a one-dimensional array of integers, found {counted(len(shape), 'dimension')} of "
            f"{dtype}; save it with tokens.astype(numpy.uint32).ravel()"
        )
    return Layout("npy", dtype.str, file.tell(), int(shape[0]))


def scan(path: Path) -> Scan:
    """Read a binary token file once: its layout, checksum and largest token.

    Raises UserError for a negative token (with its offset) and for a headerless file that is really uint32.
    """
    status = check_regular_file(path)
    layout = read_layout(path)
    digest = hashlib.sha256()
    dtype = np.dtype(layout.dtype)
    evens = odds = done = 0
    for block in _token_blocks(path, layout, digest):
        tokens = np.frombuffer(block, dtype=dtype)
        if dtype.kind == "i" and int(tokens.min()) < 0:
            where = int(np.flatnonzero(tokens < 0)[0])
            raise UserError(f"{path}, token {done + where:,}: expected a token >= 0, found {int(tokens[where])}")
        if dtype.itemsize == 8 and int(tokens.max()) > MAX_TOKEN:
            where = int(np.flatnonzero(tokens > MAX_TOKEN)[0])
            raise UserError(f"{path}, token {done + where:,}: expected at most {MAX_TOKEN}, found {int(tokens[where])}")
        evens, odds = max(evens, int(tokens[0::2].max())), max(odds, int(tokens[1::2].max(initial=0)))
        done += tokens.size
    if done != layout.tokens:
        raise UserError(f"{path}: became shorter while it was read ({done:,} of {layout.tokens:,} tokens)")
    if layout.kind == "headerless" and dtype.itemsize == 2 and not _sidecar(path).exists():
        _refuse_wide_tokens(path, layout, evens, odds)
    file = FileRef.of(path, status, digest.hexdigest())
    return Scan(file, layout, max(evens, odds))


def _token_blocks(path: Path, layout: Layout, digest: Any) -> Iterable[bytes]:
    """The tokens' bytes in blocks of whole, even numbers of tokens; every byte of the file goes into `digest`."""
    skip, rest = layout.offset, b""
    even = 2 * np.dtype(layout.dtype).itemsize
    for block in chunks_of(path, size=4 * CHUNK_BYTES):
        digest.update(block)
        data = rest + block[skip:]
        skip = max(0, skip - len(block))
        whole = len(data) - len(data) % even
        rest = data[whole:]
        if whole:
            yield data[:whole]
    if rest:
        yield rest[: len(rest) - len(rest) % (even // 2)]


def _refuse_wide_tokens(path: Path, layout: Layout, evens: int, odds: int) -> None:
    """Every second 16-bit number tiny and the others not: the halves of 32-bit tokens, which would train on noise."""
    if layout.tokens >= 64 and layout.tokens % 2 == 0 and odds <= 15 < evens:
        raise UserError(
            f"{path}: no header, and every second 16-bit number is at most {odds}: this looks like uint32 tokens; "
            f'write {{"dtype": "uint32"}} (or "uint16" if it is right) into {_sidecar(path).name}'
        )


def first_token_at_least(path: Path, layout: Layout, bound: int) -> tuple[int, int] | None:
    """Position and value of the first token >= `bound`, or None."""
    done = 0
    for block in _token_blocks(path, layout, hashlib.sha256()):
        tokens = np.frombuffer(block, dtype=layout.dtype)
        found = np.flatnonzero(tokens >= bound)
        if found.size:
            return done + int(found[0]), int(tokens[found[0]])
        done += tokens.size
    return None


class TokenWriter:
    """Writes protomamba's own layout to an open binary file: blocks of tokens first, the count at the end."""

    def __init__(self, file: IO[bytes], dtype: str) -> None:
        self._file, self._dtype = file, np.dtype(dtype)
        self.tokens, self.max_token = 0, 0
        self._file.write(bytes(HEADER_BYTES))

    def write(self, tokens: npt.NDArray[Any]) -> None:
        """Append tokens, which must fit the writer's dtype (OverflowError otherwise)."""
        if tokens.size == 0:
            return
        largest = int(tokens.max())
        if largest > np.iinfo(self._dtype).max:
            raise OverflowError(f"token {largest} does not fit {self._dtype.name}")
        self._file.write(tokens.astype(self._dtype, copy=False).tobytes())
        self.tokens += tokens.size
        self.max_token = max(self.max_token, largest)

    def finish(self) -> None:
        """Write the header, which holds the count."""
        self._file.seek(0)
        self._file.write(HEADER.pack(MAGIC, VERSION, self._dtype.itemsize, self.tokens))
        self._file.seek(0, 2)
