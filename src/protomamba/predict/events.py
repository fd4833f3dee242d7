"""A table of events as rows of `predict`: one for each group, its items in order, wherever they stand in the table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.event_buckets import EventColumns, Spread, read_bucket, spread_events
from protomamba.data.vocabulary import RESERVED, UNKNOWN, Vocabulary
from protomamba.errors import UserError
from protomamba.predict.rows import Row

Integers = npt.NDArray[np.int64]


def event_rows(
    path: Path, columns: EventColumns, vocabulary: Vocabulary | None, scratch: Path, skip_bad: bool = False
) -> Iterator[Row]:
    """{group: its name, item: tokens (L,)}, in memory of a part of the table; the parts lie in `scratch` meanwhile.

    The order of the groups is a function of the file. Without a vocabulary the items must be tokens. UserError naming
    file, row and column of what cannot be read; skip_bad: events that cannot be read come first, with their errors.
    """
    spread = spread_events([path], scratch, columns, vocabulary, skip_bad=skip_bad)
    yield from (Row(error.row, error=error.reason) for error in spread.bad)
    tokens = _tokens(path, columns, spread, vocabulary)
    number = 0
    for bucket in filter(Path.exists, spread.buckets):
        for name, items in _groups(read_bucket(bucket)):
            number += 1
            yield Row(number, {columns.group: name, columns.item: tokens[items]})
        bucket.unlink()


def _tokens(path: Path, columns: EventColumns, spread: Spread, vocabulary: Vocabulary | None) -> Integers:
    """The token of each provisional number."""
    if vocabulary is not None:
        numbers = np.arange(len(spread.numbers))
        return np.where(numbers < spread.known, numbers + RESERVED, UNKNOWN)
    try:
        return np.array([int(name) for name in spread.numbers], dtype=np.int64)
    except ValueError as error:
        raise UserError(
            f"{path}, column {columns.item!r}: expected tokens, as the model has no names of items: {error}"
        ) from None


def _groups(table: Any) -> Iterator[tuple[str, Integers]]:
    """(name, numbers of its items in order) of each group of a bucket, in the order in which they first come."""
    users = table["user"].combine_chunks().dictionary_encode()
    users = users.chunk(0) if hasattr(users, "chunk") else users
    codes = np.asarray(users.indices)
    order = np.lexsort((table["order"].to_numpy(), codes))
    items = table["item"].to_numpy()[order].astype(np.int64)
    stops = np.cumsum(np.bincount(codes, minlength=len(users.dictionary)))
    yield from zip(users.dictionary.to_pylist(), np.split(items, stops[:-1]), strict=True)


@dataclass(frozen=True)
class EventFlags:
    """What the user named; None is left to the recipe in the checkpoint."""

    group: str | None = None
    item: str | None = None
    order: str | None = None


def event_columns(first: Row | None, flags: EventFlags, recipe: Mapping[str, Any]) -> EventColumns | None:
    """The columns of the table if it is one of events, a row each; None where a row is a whole sequence."""
    if not flags.order and recipe.get("kind") != "events":
        return None
    group, item = flags.group or recipe.get("group"), flags.item or recipe.get("item")
    if not (group and item) or first is None or item not in first.fields or isinstance(first.fields[item], list):
        return None
    return EventColumns(group, item, flags.order or recipe.get("order"))
