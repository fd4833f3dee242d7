"""Whitespace-separated integers to tokens, vectorised: some 300 MB/s on one core, and errors that name the line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from protomamba.data.files import CHUNK_BYTES, chunks_of
from protomamba.errors import UserError

MAX_TOKEN = 2**32 - 1
MAX_DIGITS = 10
# One number or word is never longer than this; it bounds what is carried from one block to the next.
MAX_WORD_BYTES = 4096
WHITESPACE = b" \t\n\r\v\f"

_IS_SPACE = np.zeros(256, dtype=bool)
_IS_SPACE[list(WHITESPACE)] = True


def parse_text_file(path: Path, block_bytes: int = CHUNK_BYTES) -> Iterator[npt.NDArray[np.uint32]]:
    """The tokens of a text file, block by block, in constant memory.

    Raises UserError naming file, line and column of the first word that is not an integer from 0 to 2^32 - 1.
    """
    done = 0  # bytes before `pending` in the file
    pending = b""
    for block in chunks_of(path, size=block_bytes):
        pending += block
        # A word longer than the limit is not a number; searching no further back than that keeps the search cheap.
        cut = _last_space(pending, max(0, len(pending) - MAX_WORD_BYTES)) + 1
        if cut == 0 and len(pending) > MAX_WORD_BYTES:
            _refuse_word(path, done, pending, len(pending) - 1)
        yield parse_block(path, done, pending[:cut])
        done += cut
        pending = pending[cut:]
    yield parse_block(path, done, pending)


def parse_block(path: Path, offset: int, text: bytes) -> npt.NDArray[np.uint32]:
    """The integers in `text`, which stands at byte `offset` of `path` and begins and ends between words."""
    bytes_ = np.frombuffer(text, dtype=np.uint8)
    digits = bytes_ - np.uint8(ord("0"))  # wraps for bytes below "0", so one comparison finds the digits
    is_digit = digits < 10
    not_digit = bytes_[~is_digit]
    if not _IS_SPACE[not_digit].all():
        position = int(np.flatnonzero(~is_digit & ~_IS_SPACE[bytes_])[0])
        _refuse_word(path, offset, text, position)
    starts, ends = _runs(is_digit)
    if starts.size == 0:
        return np.empty(0, dtype=np.uint32)
    lengths = ends - starts
    longest = int(lengths.max())
    if longest > MAX_DIGITS:
        _refuse_word(path, offset, text, int(starts[lengths.argmax()]))
    values = digits[ends - 1].astype(np.uint64 if longest == MAX_DIGITS else np.uint32)
    for place in range(1, longest):
        # Positions before a short number belong to a neighbour (or wrap to the end) and are multiplied by 0.
        digit = digits[ends - 1 - place].astype(values.dtype)
        values = values + digit * np.where(lengths > place, 10**place, 0).astype(values.dtype)
    if longest == MAX_DIGITS and int(values.max()) > MAX_TOKEN:
        _refuse_word(path, offset, text, int(starts[values.argmax()]))
    return values.astype(np.uint32, copy=False)


def _runs(is_digit: npt.NDArray[np.bool_]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]:
    """First and one-past-last position of every run of digits."""
    if is_digit.size == 0:
        none = np.empty(0, dtype=np.intp)
        return none, none
    edges = np.flatnonzero(is_digit[1:] != is_digit[:-1]) + 1
    if is_digit[0]:
        edges = np.concatenate(([0], edges))
    if is_digit[-1]:
        edges = np.concatenate((edges, [is_digit.size]))
    return edges[0::2], edges[1::2]


def _last_space(text: bytes, start: int = 0) -> int:
    return max(text.rfind(bytes([space]), start) for space in WHITESPACE)


def _refuse_word(path: Path, offset: int, text: bytes, position: int) -> NoReturn:
    """Raise the UserError for the word of `text` that holds `position`; `text` stands at `offset` of the file."""
    start = _last_space(text[:position]) + 1
    rest = text[start : start + MAX_WORD_BYTES].split(None, 1)
    word = rest[0] if rest else text[start:]
    line, column = _line_and_column(path, offset + start)
    raise UserError(
        f"{path}, line {line}, column {column}: expected an integer token, found {describe_word(word)}; "
        "a .txt token file holds whitespace-separated integers (use `protomamba prepare` to make tokens from text)"
    )


def describe_word(word: bytes) -> str:
    """What a wrong word is, in words: the reader of the message should not have to guess."""
    if any(byte >= 128 for byte in word):
        try:
            text = word.decode("utf-8")
        except UnicodeDecodeError as error:
            return f"the byte 0x{word[error.start]:02x}, which is not UTF-8 text"
    else:
        text = word.decode("ascii")
    shown = repr(text if len(text) <= 40 else text[:40] + "...")
    if word.isdigit():
        return f"{shown}, beyond {MAX_TOKEN} or longer than {MAX_DIGITS} digits"
    if word.startswith(b"-") and word[1:].isdigit():
        return f"the negative number {shown}"
    try:
        float(text)
    except ValueError:
        return f"the word {shown}"
    return f"the number {shown}, which is not a plain integer"


def _line_and_column(path: Path, position: int) -> tuple[int, int]:
    line, line_start, done = 1, 0, 0
    for block in chunks_of(path):
        part = block[: position - done]
        line += part.count(b"\n")
        if b"\n" in part:
            line_start = done + part.rfind(b"\n") + 1
        done += len(block)
        if done >= position:
            break
    return line, position - line_start + 1
