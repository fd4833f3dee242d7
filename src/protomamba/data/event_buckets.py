"""Events spread over temporary files by user, so that each file fits in memory and holds all of its users' rows."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.blocks import BadRowError, Block, each_good
from protomamba.data.columns import OrderKeys, PromotedError, exploded, names_of
from protomamba.data.compressed import import_pyarrow, is_compressed, plain_suffix
from protomamba.data.files import check_regular_file
from protomamba.data.tables import read_blocks
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
    skip_bad: bool = False,
) -> Spread:
    """Read the tables once and spread their rows over files in `scratch`. UserError naming what cannot be read.

    skip_bad: leaves out rows that cannot be read, and names them in `bad`.
    """
    keys = OrderKeys()
    try:
        return _spread(paths, scratch, columns, vocabulary, keys, progress, skip_bad)
    except PromotedError:  # its kind is remembered: once more, from the start
        return _spread(paths, scratch, columns, vocabulary, keys, progress, skip_bad)


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
    bad: list[BadRowError] = field(default_factory=list)

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
    skip_bad: bool,
) -> Spread:
    sizes = [check_regular_file(path).st_size for path in paths]
    spread = Spread(bucket_paths(paths, scratch), {})
    on_bad = spread.bad.append if skip_bad else None
    if vocabulary is not None:
        spread.numbers = {name: token - RESERVED for name, token in vocabulary.tokens.items()}
        spread.known = len(spread.numbers)
    with ExitStack() as stack:
        sinks = Sinks(spread.buckets, stack)
        work = partial(_spread_block, columns=columns, spread=spread, keys=keys, sinks=sinks)
        for number, path in enumerate(paths):
            for block in read_blocks(path, columns.names, on_bad):
                each_good(block, work, on_bad)
            if progress:
                progress(sum(sizes[: number + 1]), sum(sizes))
    spread.order_dtype = keys.dtype
    if not spread.rows:
        raise UserError(f"{paths[0] if paths else 'no input'}: expected events, found no row that can be read")
    return spread


def bucket_paths(paths: Sequence[Path], scratch: Path) -> list[Path]:
    """So many files that what each takes of the rows fits in memory."""
    factors = [PACKED_FACTOR if is_compressed(p) or plain_suffix(p) == ".parquet" else 1 for p in paths]
    to_come = sum(check_regular_file(p).st_size * factor for p, factor in zip(paths, factors, strict=True))
    return [scratch / f"{number}.arrow" for number in range(min(MAX_BUCKETS, 1 + to_come // BUCKET_BYTES))]


class Sinks:
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

    def write_all(self, buckets: Integers, batch: Any) -> None:
        """Each row of a batch into its bucket, in order."""
        import pyarrow as pa

        by_bucket = np.argsort(buckets, kind="stable")
        edges = np.searchsorted(buckets[by_bucket], np.arange(len(self._paths) + 1))
        for bucket in np.flatnonzero(np.diff(edges)).tolist():
            self.write(bucket, batch.take(pa.array(by_bucket[edges[bucket] : edges[bucket + 1]])))


def buckets_of(groups: Any, count: int) -> Integers:
    """The bucket of each name, by its checksum. groups: an array of text."""
    encoded = groups.dictionary_encode()
    checksums = np.array([zlib.crc32(name.encode()) for name in encoded.dictionary.to_pylist()], dtype=np.int64)
    found: Integers = (checksums % count)[np.asarray(encoded.indices)]
    return found


def _spread_block(block: Block, columns: EventColumns, spread: Spread, keys: OrderKeys, sinks: Sinks) -> None:
    import pyarrow as pa

    users, _ = names_of(block, columns.group)
    order = keys.of(block, columns.order) if columns.order else None
    listed, rows_of = exploded(block, columns.item)
    items, integers = names_of(listed, columns.item)
    spread.integers &= integers or pa.types.is_string(items.type)
    encoded_items = items.dictionary_encode()
    codes = np.asarray(encoded_items.indices)
    names = encoded_items.dictionary.to_pylist()
    numbers = spread.add(names, np.bincount(codes, minlength=len(names)))[codes]
    buckets = buckets_of(users, len(spread.buckets))
    if rows_of is not None:
        buckets, users = buckets[rows_of], users.take(pa.array(rows_of))
        order = None if order is None else order[rows_of]
    order = np.zeros(len(numbers), dtype="<i8") if order is None else order
    found = [users, pa.array(order), pa.array(numbers.astype(np.uint32))]
    sinks.write_all(buckets, pa.record_batch(found, names=["user", "order", "item"]))
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
