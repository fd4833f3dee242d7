"""Events spread over temporary files by user, so that each file fits in memory and holds all of its users' rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.columns import OrderKeys, PromotedError, exploded, names_of
from protomamba.data.compressed import import_pyarrow, is_compressed, plain_suffix
from protomamba.data.files import check_regular_file
from protomamba.data.tables import Block, read_blocks
from protomamba.data.vocabulary import RESERVED, Vocabulary
from protomamba.errors import UserError

BUCKET_BYTES, MAX_BUCKETS = 32 << 20, 256
# How many bytes of text a byte of a compressed file or of parquet is taken to be.
PACKED_FACTOR = 5
Integers = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class EventColumns:
    """The columns of a table of events; without `order` the rows are in order."""

    group: str
    item: str
    order: str | None = None

    @property
    def names(self) -> list[str]:
        """Those to read."""
        return list(dict.fromkeys([self.group, self.item, *([self.order] if self.order else [])]))


def spread_events(
    paths: Sequence[Path],
    scratch: Path,
    columns: EventColumns,
    vocabulary: Vocabulary | None = None,
    progress: Progress | None = None,
) -> Spread:
    """Read the tables once and spread their rows over files in `scratch`. UserError naming what cannot be read."""
    keys = OrderKeys()
    try:
        return _spread(paths, scratch, columns, vocabulary, keys, progress)
    except PromotedError:  # its kind is remembered: once more, from the start
        return _spread(paths, scratch, columns, vocabulary, keys, progress)


@dataclass
class Spread:
    """What the first pass found: provisional numbers of the items and how often each occurs, in numbers' order."""

    buckets: list[Path]
    numbers: dict[str, int]
    counts: Integers = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    known: int = 0  # items that have a token already
    rows: int = 0
    integers: bool = True
    order_dtype: str = "<i8"

    def add(self, names: list[str], counts: Integers) -> Integers:
        """The numbers of some names, after counting them."""
        numbers = self.numbers
        found = np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)
        if len(numbers) > len(self.counts):
            self.counts = np.concatenate((self.counts, np.zeros(len(numbers), dtype=np.int64)))  # doubles at least
        self.counts[found] += counts
        return found


def _spread(
    paths: Sequence[Path],
    scratch: Path,
    columns: EventColumns,
    vocabulary: Vocabulary | None,
    keys: OrderKeys,
    progress: Progress | None,
) -> Spread:
    sizes = [check_regular_file(path).st_size for path in paths]
    factors = [PACKED_FACTOR if is_compressed(p) or plain_suffix(p) == ".parquet" else 1 for p in paths]
    bytes_to_come = sum(size * factor for size, factor in zip(sizes, factors, strict=True))
    count = min(MAX_BUCKETS, 1 + bytes_to_come // BUCKET_BYTES)
    spread = Spread([scratch / f"{number}.arrow" for number in range(count)], {})
    if vocabulary is not None:
        spread.numbers = {name: token - RESERVED for name, token in vocabulary.tokens.items()}
        spread.known = len(spread.numbers)
    with ExitStack() as stack:
        sinks = _Sinks(spread.buckets, stack)
        for number, path in enumerate(paths):
            for block in read_blocks(path, columns.names):
                _spread_block(block, columns, spread, keys, sinks)
            if progress:
                progress(sum(sizes[: number + 1]), sum(sizes))
    spread.order_dtype = keys.dtype
    if not spread.rows:
        raise UserError(f"{paths[0] if paths else 'no input'}: expected events, found no row")
    return spread


class _Sinks:
    """One temporary file for each bucket, opened when its first rows come."""

    def __init__(self, paths: Sequence[Path], stack: ExitStack) -> None:
        self._paths, self._stack = paths, stack
        self._writers: dict[int, Any] = {}

    def write(self, bucket: int, batch: Any) -> None:
        if bucket not in self._writers:
            pyarrow = import_pyarrow(self._paths[bucket])
            file = self._stack.enter_context(pyarrow.OSFile(str(self._paths[bucket]), "wb"))
            self._writers[bucket] = self._stack.enter_context(pyarrow.ipc.new_stream(file, batch.schema))
        self._writers[bucket].write_batch(batch)


def _spread_block(block: Block, columns: EventColumns, spread: Spread, keys: OrderKeys, sinks: _Sinks) -> None:
    import pyarrow as pa

    users, _ = names_of(block, columns.group)
    order = keys.of(block, columns.order) if columns.order else None
    listed, rows_of = exploded(block, columns.item)
    items, integers = names_of(listed, columns.item)
    spread.integers &= integers or pa.types.is_string(items.type)
    encoded_items, encoded_users = items.dictionary_encode(), users.dictionary_encode()
    codes = np.asarray(encoded_items.indices)
    names = encoded_items.dictionary.to_pylist()
    numbers = spread.add(names, np.bincount(codes, minlength=len(names)))[codes]
    checksums = np.array([zlib.crc32(name.encode()) for name in encoded_users.dictionary.to_pylist()], dtype=np.int64)
    buckets = (checksums % len(spread.buckets))[np.asarray(encoded_users.indices)]
    if rows_of is not None:
        buckets, users = buckets[rows_of], users.take(pa.array(rows_of))
        order = None if order is None else order[rows_of]
    order = np.zeros(len(numbers), dtype="<i8") if order is None else order
    by_bucket = np.argsort(buckets, kind="stable")
    edges = np.searchsorted(buckets[by_bucket], np.arange(len(spread.buckets) + 1))
    for bucket in np.flatnonzero(np.diff(edges)).tolist():
        chosen = by_bucket[edges[bucket] : edges[bucket + 1]]
        found = [users.take(pa.array(chosen)), pa.array(order[chosen]), pa.array(numbers[chosen].astype(np.uint32))]
        sinks.write(bucket, pa.record_batch(found, names=["user", "order", "item"]))
    spread.rows += len(numbers)


@dataclass(frozen=True)
class Users:
    """The users of one bucket: their checksums, how many events each has, and all of these in order."""

    checksums: Integers
    counts: Integers
    keys: npt.NDArray[Any]
    items: Integers


def read_bucket(path: Path) -> Any:
    pyarrow = import_pyarrow(path)
    with pyarrow.memory_map(str(path)) as file:
        return pyarrow.ipc.open_stream(file).read_all().combine_chunks()


def users_of(path: Path) -> Users:
    table = read_bucket(path)
    users = table["user"].combine_chunks().dictionary_encode()
    users = users.chunk(0) if hasattr(users, "chunk") else users
    codes, keys = np.asarray(users.indices), table["order"].to_numpy()
    order = np.lexsort((keys, codes))
    checksums = [zlib.crc32(name.encode()) for name in users.dictionary.to_pylist()]
    counts = np.bincount(codes, minlength=len(checksums))
    items = table["item"].to_numpy()[order].astype(np.int64)
    return Users(np.array(checksums, dtype=np.int64), counts, keys[order], items)
