"""Batches of labelled sequences: the endless shuffled order of training, and the fixed ones of an evaluation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch

from protomamba.data.order import endless
from protomamba.data.stream import BatchStream, Identity
from protomamba.data.windows import Batch, Cursor
from protomamba.words import counted, ranged

if TYPE_CHECKING:
    from protomamba.data.labels import LabelledSequences

Integers = npt.NDArray[np.int64]

# Key of this order; it only has to differ from those of the other shuffles.
_SEQUENCES = 3


class LabelledStream(BatchStream):
    """All sequences once an epoch, in an order drawn anew for each: a function of (seed, epoch, index).

    Row r of batch b is number b * batch_size + r of the endless order; a batch that the end of an epoch leaves unfilled
    takes its other rows from the next one. Rows are as long as the batch's longest sequence.
    """

    def __init__(self, sequences: LabelledSequences, *, batch_size: int, seed: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size {batch_size}: expected at least 1")
        self.sequences, self.batch_size, self.seed = sequences, batch_size, seed
        self._fingerprint = sequences.fingerprint()

    def batch(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}")
        numbers = np.arange(index * self.batch_size, (index + 1) * self.batch_size)
        _, places = endless(numbers, len(self.sequences), self.seed, _SEQUENCES)
        return make_labelled_batch(self.sequences, places, self.cursor(index + 1))

    @property
    def rows_per_epoch(self) -> int:
        return len(self.sequences)

    def settings(self) -> Cursor:
        return {"labelled": 1, "data": self._fingerprint}

    def identity(self) -> Identity:
        return self.sequences.identity()

    def describe(self) -> str:
        lengths, unit = self.sequences.lengths, "step" if self.sequences.info.channels else "token"
        return (
            f"{counted(len(self.sequences), 'labelled sequence')} of {ranged(lengths.min(), lengths.max(), unit)} "
            f"({len(self.sequences) / self.batch_size:,.1f} steps an epoch)"
        )


def labelled_eval_batches(sequences: LabelledSequences, batch_size: int, count: int | None = None) -> Iterator[Batch]:
    """The same sequences every time, spread evenly over all: at most `count` batches (None: every sequence)."""
    total = len(sequences)
    wanted = total if count is None else min(total, count * batch_size)
    for first in range(0, wanted, batch_size):
        places = np.arange(first, min(first + batch_size, wanted)) * total // wanted
        yield make_labelled_batch(sequences, places, {})


def make_labelled_batch(sequences: LabelledSequences, places: Integers, cursor: Cursor) -> Batch:
    """The sequences at `places` as rows; targets are the labels, negative where there is none."""
    tokens_BL, labels_BL = sequences.read(places)
    return Batch(torch.from_numpy(tokens_BL), torch.from_numpy(labels_BL), None, cursor)
