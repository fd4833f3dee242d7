"""Batches of packed sequences: the endless shuffled order of training, and the fixed rows of an evaluation.

Which pieces share a row is drawn once by the seed (packing.py); the order of the rows is drawn anew each epoch, and so
is the strand from which a sequence is read where it has two. A batch is a function of (seed, epoch, index) alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from protomamba.data.order import derive_key, endless, hashed
from protomamba.data.packing import Packing
from protomamba.data.stream import BatchStream, Identity
from protomamba.data.windows import Batch, Cursor
from protomamba.errors import UserError
from protomamba.words import counted, ranged

if TYPE_CHECKING:
    from protomamba.data.sequences import SequenceSet

Integers = npt.NDArray[np.int64]
# Keys of these draws; they only have to differ from those of the other orders.
_ROWS, _STRANDS = 7, 8


class SequenceStream(BatchStream):
    """All rows of a SequenceSet once an epoch; every transition of every sequence is trained once in it.

    Row r of batch b is number b * batch_size + r of the endless order. Batches say where a sequence begins inside a
    row (`reset_BL`), and are as wide as their fullest row. UserError without any sequence.
    """

    def __init__(self, sequences: SequenceSet, *, batch_size: int, seq_len: int, seed: int) -> None:
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size {batch_size} and seq_len {seq_len}: expected at least 1")
        refuse_empty(sequences)
        self.sequences, self.batch_size, self.seq_len, self.seed = sequences, batch_size, seq_len, seed
        self.packing = sequences.packing(seq_len, seed)
        self._fingerprint = sequences.fingerprint()

    def batch(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}")
        numbers = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        epochs, rows = endless(numbers, len(self.packing), self.seed, _ROWS)
        return as_batch(self.sequences, self.packing, rows, self._strands(epochs, rows), self.cursor(index + 1))

    def _strands(self, epochs: Integers, rows: Integers) -> npt.NDArray[np.bool_] | None:
        """Whether each piece of the rows is read from the other strand: one draw for a sequence and epoch."""
        if self.sequences.complement is None:
            return None
        packing = self.packing
        drawn = [
            hashed(packing.sequence[packing.rows[row] : packing.rows[row + 1]], derive_key(self.seed, epoch, _STRANDS))
            for epoch, row in zip(epochs.tolist(), rows.tolist(), strict=True)
        ]
        strands: npt.NDArray[np.bool_] = np.concatenate(drawn) & np.uint64(1) == 1
        return strands

    @property
    def rows_per_epoch(self) -> int:
        return len(self.packing)

    def settings(self) -> Cursor:
        return {
            "seq_len": self.seq_len,
            "sequences": 1,
            "both_strands": int(self.sequences.complement is not None),
            "data": self._fingerprint,
        }

    def identity(self) -> Identity:
        return self.sequences.identity()

    def describe(self) -> str:
        lengths, steps = self.sequences.lengths, len(self.packing) / self.batch_size
        return (
            f"{counted(len(self.sequences), 'sequence')} of {ranged(lengths.min(), lengths.max(), 'token')}, each "
            f"from a state of its own ({steps:,.1f} steps an epoch); {self.packing.describe()}"
        )


def refuse_empty(sequences: SequenceSet) -> None:
    """UserError if there is nothing to predict."""
    if not len(sequences):
        raise UserError(f"{sequences.store.shards[0].where}: the {sequences.name} part has no sequence")


def sequence_eval_batches(
    sequences: SequenceSet, batch_size: int, seq_len: int, count: int | None = None
) -> Iterator[Batch]:
    """The same rows every time, spread evenly over all: at most `count` batches (None: every target once)."""
    refuse_empty(sequences)
    packing = sequences.packing(seq_len, None)
    total = len(packing)
    wanted = total if count is None else min(total, count * batch_size)

    def batches() -> Iterator[Batch]:
        for first in range(0, wanted, batch_size):
            rows = np.arange(first, min(first + batch_size, wanted)) * total // wanted
            yield as_batch(sequences, packing, rows, None, {})

    return batches()


def as_batch(
    sequences: SequenceSet,
    packing: Packing,
    rows: Integers,
    flipped: npt.NDArray[np.bool_] | None,
    cursor: Cursor,
) -> Batch:
    """Some rows as tensors."""
    tokens, targets, reset = sequences.read(packing, rows, flipped)
    return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), torch.from_numpy(reset), cursor)
