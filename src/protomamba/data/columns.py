"""Columns of a table as what they stand for: names, orders, numbers. What does not fit is named by its row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.blocks import Array, Block
from protomamba.errors import UserError

EXPECTED_NAME = "a name or a whole number"


def names_of(block: Block, column: str) -> tuple[Array, bool]:
    """A column as text without gaps, and whether its type is whole numbers (a CSV's is not known here)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = plain(block.columns[column])
    if pa.types.is_null(array.type):
        block.refuse(0, column, EXPECTED_NAME, None)
    integers = pa.types.is_integer(array.type)
    if not integers and not pa.types.is_string(array.type) and not pa.types.is_large_string(array.type):
        raise UserError(f"{block.path}, column {column!r}: expected names or whole numbers, found {array.type}")
    text = array.cast(pa.string())
    missing = pc.or_kleene(pc.is_null(text), pc.equal(text, "")).fill_null(True)
    if pc.any(missing).as_py():
        block.refuse(pc.index(missing, True).as_py(), column, EXPECTED_NAME, None)
    return text, integers


def plain(array: Array) -> Array:
    """A dictionary-encoded column (a category) as its values."""
    import pyarrow as pa

    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array


def exploded(block: Block, column: str) -> tuple[Block, npt.NDArray[np.int64] | None]:
    """A column of lists as a block of their elements, and the row (from 0) of each; other columns as they are."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = block.columns[column]
    if not (pa.types.is_list(array.type) or pa.types.is_large_list(array.type)):
        return block, None
    lengths = pc.list_value_length(array).fill_null(0).to_numpy(zero_copy_only=False)
    if (empty := np.flatnonzero(lengths == 0)).size:
        block.refuse(int(empty[0]), column, "a list of at least one item", None)
    rows_of = np.repeat(np.arange(len(array)), lengths)
    numbers = rows_of + block.first if block.rows is None else block.rows[rows_of]
    return Block(block.path, block.first, {column: array.flatten()}, numbers), rows_of


class OrderKeys:
    """A column to order by as comparable numbers: whole numbers, other numbers, or dates and times in ISO 8601.

    What it holds, the first value says; PromotedError asks to begin again where whole numbers turn out to be fractions.
    """

    def __init__(self) -> None:
        self.kind: str | None = None

    @property
    def dtype(self) -> str:
        return "<f8" if self.kind == "number" else "<i8"

    def of(self, block: Block, column: str) -> npt.NDArray[Any]:
        """The keys of a block. UserError naming the row of the first value that is none."""
        import pyarrow as pa

        array = plain(block.columns[column])
        if pa.types.is_null(array.type):
            block.refuse(0, column, "a number or a date", None)
        if array.null_count:
            block.refuse(array.is_null().index(True).as_py(), column, "a number or a date", None)
        kinds = [self.kind] if self.kind else list(_CASTS)
        for kind in kinds:
            found = _cast(array, kind)
            if found is not None and not (kind == "number" and not np.isfinite(found).all()):
                self.kind = kind
                return found
        if self.kind == "whole number" and _cast(array, "number") is not None:
            self.kind = "number"
            raise PromotedError
        row = next((i for i, value in enumerate(array) if not self._fits(pa.array([value.as_py()], array.type))), 0)
        expected = f"a {self.kind} as in the rows before" if self.kind else "a number or a date (ISO 8601)"
        block.refuse(row, column, expected, array[row].as_py())

    def _fits(self, value: Array) -> bool:
        """Whether a single value is of the kind; remembers the first one's."""
        for kind in [self.kind] if self.kind else list(_CASTS):
            found = _cast(value, kind)
            if found is not None and np.isfinite(found).all():
                self.kind = "number" if kind == "whole number" else kind
                return True
        return False


class PromotedError(Exception):
    """Whole numbers so far, a fraction now: what was read has to be read again as numbers."""


def _cast(array: Array, kind: str) -> npt.NDArray[Any] | None:
    import pyarrow as pa

    try:
        return _CASTS[kind](array)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        return None


def _whole(array: Array) -> npt.NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_temporal(array.type):
        raise pa.ArrowInvalid("a time")
    return np.asarray(array.cast(pa.int64()))


def _number(array: Array) -> npt.NDArray[Any]:
    import pyarrow as pa

    return np.asarray(array.cast(pa.float64()))


def _time(array: Array, zone: str | None) -> npt.NDArray[Any]:
    import pyarrow as pa

    if pa.types.is_floating(array.type) or pa.types.is_integer(array.type):
        raise pa.ArrowInvalid("a number")
    return np.asarray(array.cast(pa.timestamp("ns", zone)).cast(pa.int64()))


_CASTS: dict[str, Callable[[Array], npt.NDArray[Any]]] = {
    "whole number": _whole,
    "number": _number,
    "date or time": lambda array: _time(array, None),
    "time with its zone": lambda array: _time(array, "UTC"),
}


def floats_of(block: Block, column: str) -> npt.NDArray[np.float32]:
    """A column as float32 with NaN where there is nothing (empty, null, nan, NA, ?)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    array = plain(block.columns[column])
    if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
        text = pc.utf8_trim_whitespace(array)
        array = pc.if_else(pc.is_in(text, pa.array(MISSING)), pa.scalar(None, pa.string()), text)
    elif pa.types.is_boolean(array.type):
        array = array.cast(pa.int8())
    try:
        values = array.cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError):
        row = next(i for i, value in enumerate(array) if not _is_number(value.as_py()))
        block.refuse(row, column, "a number", array[row].as_py())
    found = np.asarray(values.fill_null(np.nan), dtype=np.float64)
    if (beyond := np.flatnonzero(np.abs(found) > LARGEST)).size:
        block.refuse(int(beyond[0]), column, "a finite number of float32", float(found[beyond[0]]))
    return found.astype(np.float32)


LARGEST = float(np.finfo(np.float32).max)
MISSING = ["", "?", "nan", "NaN", "NA", "null", "None"]


def _is_number(value: Any) -> bool:
    try:
        float(value if value is not None else 0)
    except (TypeError, ValueError, OverflowError):
        return False
    return True
