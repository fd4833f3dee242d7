"""Real-valued series with labels: `.ts` files of aeon and sktime, and `.npz` files of arrays.

Each gives rows (number, label, values): values float32 (steps, channels), NaN where one is missing. Steps at the end of
a series in which nothing is known are not part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
import numpy.typing as npt

from protomamba.data.arrays import load_npz
from protomamba.data.compressed import BOM, lines_of
from protomamba.errors import UserError

Floats = npt.NDArray[np.float32]
Series = tuple[int, str, Floats]
LARGEST = float(np.finfo(np.float32).max)
VALUES, LABELS, LENGTHS = "X", "y", "lengths"
# More than any header has, and few enough to be read in no time.
HEADER_LINES = 10_000
# Characters of a line whose values are read together.
PIECE = 65_536


def trimmed(values: Floats) -> Floats:
    """Without the steps at the end in which every channel is missing."""
    known = np.asarray(~np.isnan(values).all(axis=1))
    return values[: len(known) - int(known[::-1].argmax())] if known.any() else values[:0]


def read_ts(path: Path, any_label: bool = False) -> Iterator[Series]:
    """A `.ts` file: a line a case, its channels between colons, its label behind the last. UserError naming the line.

    any_label: also one that is none of the header's classes, such as `?`, where labels are not looked at.
    `?` and NaN are missing values; channels of one case may differ in length and are filled up with NaN.
    """
    in_data, labelled, classes = False, True, list[str]()
    for number, raw in lines_of(path):
        line = raw.removeprefix(BOM if number == 1 else b"").strip().decode("utf-8", "replace").strip()
        if not in_data and number > HEADER_LINES:
            _refuse(path, number, f"@data within the first {HEADER_LINES:,} lines", line)
        if not line or line.startswith("#"):
            continue
        if in_data:
            case = _ts_case(path, number, line)
            if classes and case[1] not in classes and not any_label:
                _refuse(path, number, f"a label of @classLabel ({', '.join(classes[:10])})", case[1])
            yield case
            continue
        word, *rest = line.lower().split()
        if word == "@classlabel":
            labelled, classes = rest[:1] != ["false"], line.split()[2:]
        if word == "@timestamps" and rest[:1] == ["true"]:
            _refuse(path, number, "values without time stamps (@timeStamps false)", "time stamps")
        if not word.startswith("@"):
            _refuse(path, number, "a line of the header, @data before the first case", line)
        if word == "@data":
            in_data = True
            if not labelled:
                _refuse(path, number, "a label with each case (@classLabel true ...)", "@classLabel false")
    if not in_data:
        raise UserError(f"{path}: expected a .ts file, found no line @data")


def _ts_case(path: Path, number: int, line: str) -> Series:
    *channels, label = line.split(":")
    if not channels or not label.strip():
        _refuse(path, number, "channels of values and a label, with colons between them", line)
    steps = max(text.count(",") for text in channels) + 1
    values = np.full((steps, len(channels)), np.nan, dtype=np.float32)
    for channel, text in enumerate(channels):
        start = 0
        for piece in _pieces(text):
            words = piece.split(",")
            values[start : start + len(words), channel] = [_ts_value(path, number, channel + 1, x) for x in words]
            start += len(words)
    return number, label.strip(), trimmed(values)


def _ts_value(path: Path, number: int, place: int, word: str) -> float:
    try:
        value = float("nan") if word.strip() in ("?", "") else float(word)
    except ValueError:
        value = float("inf")
    if abs(value) > LARGEST:
        _refuse(path, number, f"finite numbers in channel {place}", word.strip())
    return value


def _pieces(text: str) -> Iterator[str]:
    """The values between commas, some thousand at a time: all words of a long line at once take 30 times its memory."""
    start = 0
    while (stop := text.find(",", start + PIECE)) >= 0:
        yield text[start:stop]
        start = stop + 1
    yield text[start:]


def _refuse(path: Path, number: int, expected: str, found: str) -> NoReturn:
    raise UserError(f"{path}, line {number:,}: expected {expected}, found {found[:40]!r}")


def read_npz(path: Path, values_name: str | None, label_name: str | None) -> Iterator[Series]:
    """A `.npz` of an array N x steps or N x steps x channels and one of N labels, and, if there, `lengths` (N)."""
    arrays = load_npz(path)
    values = _array(path, arrays, values_name or VALUES, "--values")
    labels = _array(path, arrays, label_name or LABELS, "--label")
    values = values[:, :, None] if values.ndim == 2 else values
    if values.ndim != 3 or values.dtype.kind not in "fiub" or labels.shape != values.shape[:1]:
        raise UserError(
            f"{path}: expected numbers N x steps (x channels) and N labels, found {values.dtype} of shape "
            f"{values.shape} and labels of shape {labels.shape}"
        )
    lengths = _lengths(path, arrays, values.shape[:2])
    for row, (series, label, length) in enumerate(zip(values, labels.tolist(), lengths.tolist(), strict=True), 1):
        with np.errstate(over="ignore"):
            known = series[: int(length)].astype(np.float32)
        if np.isinf(known).any():
            raise UserError(f"{path}, row {row:,}: expected finite numbers of float32, found one beyond")
        yield row, str(label), trimmed(known)


def _lengths(path: Path, arrays: dict[str, npt.NDArray[np.generic]], shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    lengths = arrays.get(LENGTHS, np.full(shape[0], shape[1]))
    sound = lengths.shape == shape[:1] and lengths.dtype.kind in "iu"
    if not sound or (lengths.size and not 0 <= int(lengths.min()) <= int(lengths.max()) <= shape[1]):
        raise UserError(
            f"{path}, array {LENGTHS!r}: expected a length of 0 to {shape[1]} steps for each of {shape[0]} series, "
            f"found {lengths.dtype} of shape {lengths.shape}, values {str(lengths.ravel()[:4].tolist())[:60]}"
        )
    return lengths


def _array(path: Path, arrays: dict[str, npt.NDArray[np.generic]], name: str, flag: str) -> npt.NDArray[np.generic]:
    if name not in arrays:
        raise UserError(f"{path}: no array {name!r}: it holds {', '.join(arrays) or 'none'}; name it with {flag}")
    return arrays[name]
