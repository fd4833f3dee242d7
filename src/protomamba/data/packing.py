"""From sequences to rows: long ones cut into windows with context, short ones packed side by side, none trained twice.

A transition j of a sequence is its token j predicted from the tokens before it; the first one is predicted from the
boundary. A piece is the transitions [first, stop) of one sequence that stand in one row, of which those from `judged`
on are trained: what lies before only builds up the state. Rows hold whole pieces, each from a zero state.

Rows are filled best fit first, longest piece first, by how many pieces there are of each length rather than one by one
(Krell et al. 2021, "Efficient sequence packing without cross-contamination"), so that millions take a second.
"""

from __future__ import annotations

import bisect
from collections import defaultdict
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protomamba.data.order import hashed
from protomamba.words import counted

Integers = npt.NDArray[np.int64]
# A long sequence's further windows begin with this share of a row that only builds up the state again.
CONTEXT_SHARE = 0.25


@dataclass(frozen=True)
class Packing:
    """Rows of pieces. Piece p is transitions `first[p]` to `stop[p]` of `sequence[p]`, trained from `judged[p]` on.

    Row r holds the pieces from `rows[r]` to `rows[r + 1]`.
    """

    sequence: Integers
    first: Integers
    judged: Integers
    stop: Integers
    rows: Integers
    row_size: int

    def __len__(self) -> int:
        return len(self.rows) - 1

    @property
    def trained(self) -> int:
        """Transitions that are trained in all rows."""
        return int((self.stop - self.judged).sum())

    @property
    def context(self) -> int:
        """Transitions that only build up the state."""
        return int((self.judged - self.first).sum())

    def describe(self) -> str:
        """How the rows are used, in shares of all their places."""
        places = max(1, len(self) * self.row_size)
        trained, context = self.trained / places, self.context / places
        return (
            f"{counted(len(self), 'row')} of {self.row_size:,} an epoch: {trained:.1%} of them trained, {context:.1%} "
            f"context carried into the windows of long sequences, {max(0.0, 1 - trained - context):.1%} empty"
        )


def pack(lengths: Integers, judged: Integers, row_size: int, key: int, *, full_context: bool = False) -> Packing:
    """Rows for sequences of `lengths` tokens, of which those from `judged` on are trained.

    `key` draws which pieces share a row. `full_context` fills a window with all the context that fits, for evaluation;
    without it a window has CONTEXT_SHARE of a row, so that its targets are most of it.
    """
    sequence, first, start, stop = _cut(lengths, judged, row_size, full_context)
    order, rows = _fill(stop - first, row_size, key)
    return Packing(sequence[order], first[order], start[order], stop[order], rows, row_size)


def _cut(lengths: Integers, judged: Integers, row_size: int, full_context: bool) -> tuple[Integers, ...]:
    """Sequence, first transition, first trained one and end of every window."""
    context = int(row_size * CONTEXT_SHARE)
    begin = np.maximum(judged - context, 0)
    further = np.maximum(lengths - begin - row_size, 0)
    windows = np.where(lengths > judged, 1 + -(-further // (row_size - context)), 0)
    sequence = np.repeat(np.arange(len(lengths)), windows)
    number = np.arange(len(sequence)) - np.repeat(np.cumsum(windows) - windows, windows)
    first = begin[sequence] + number * (row_size - context)
    stop = np.minimum(first + row_size, lengths[sequence])
    start = np.where(number == 0, judged[sequence], first + context)
    return sequence, np.maximum(stop - row_size, 0) if full_context else first, start, stop


def _fill(sizes: Integers, row_size: int, key: int) -> tuple[Integers, Integers]:
    """Pieces in the order of the rows that hold them, and where each row begins in that order."""
    drawn = np.argsort(hashed(np.arange(len(sizes)), key), kind="stable")
    pool = drawn[np.argsort(sizes[drawn], kind="stable")]
    counts = np.bincount(sizes, minlength=row_size + 1)
    next_of = np.concatenate(([0], np.cumsum(counts)))  # where the pieces of each size begin in the pool
    order, per_row = [np.empty(0, dtype=np.int64)], [np.empty(0, dtype=np.int64)]
    for rows, pattern in _patterns(counts, row_size):
        columns = []
        for size, copies in pattern:
            taken = pool[next_of[size] : next_of[size] + rows * copies]
            next_of[size] += rows * copies
            columns.append(taken.reshape(rows, copies))
        order.append(np.concatenate(columns, axis=1).reshape(-1))
        per_row.append(np.full(rows, sum(copies for _, copies in pattern)))
    return np.concatenate(order), np.concatenate(([0], np.cumsum(np.concatenate(per_row))))


Pattern = tuple[tuple[int, int], ...]  # (size, how many of it) of a row's pieces


def _patterns(counts: Integers, row_size: int) -> list[tuple[int, Pattern]]:
    """How many rows are filled in which way, so that every piece has a place: best fit, longest first."""
    by_room: dict[int, list[tuple[int, Pattern]]] = defaultdict(list)
    rooms: list[int] = []  # those with rows, ascending
    for size in range(row_size, 0, -1):
        left = int(counts[size])
        while left:
            place = bisect.bisect_left(rooms, size)
            room = rooms[place] if place < len(rooms) else row_size
            rows, pattern = by_room[room].pop() if by_room[room] else (left, ())
            if not by_room[room] and place < len(rooms):
                del rooms[place]
            copies = min(room // size, left)
            used = min(rows, left // copies)
            left -= used * copies
            _put(by_room, rooms, room - copies * size, used, (*pattern, (size, copies)))
            if rows > used and pattern:
                _put(by_room, rooms, room, rows - used, pattern)
    return [each for room in sorted(by_room) for each in by_room[room]]


def _put(by_room: dict[int, list[tuple[int, Pattern]]], rooms: list[int], room: int, rows: int, way: Pattern) -> None:
    if not by_room[room]:
        bisect.insort(rooms, room)
    by_room[room].append((rows, way))
