"""Batches from a torch Dataset of your own, in an order that is a function of (seed, epoch, index)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from protomamba.data.order import derive_key, permute
from protomamba.data.stream import BatchStream, Identity
from protomamba.data.windows import Batch, Cursor
from protomamba.errors import UserError

IGNORED = -100
_KEY = 3  # of this kind of shuffling; the kinds of the other streams have others


class Items(Protocol):
    """A map-style torch Dataset: item i is (inputs, targets) of equal length, or with reset as a third tensor.

    It must give the same item each time it is asked for it: then a resumed run is exact.
    """

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[Sequence[Any]], tuple[Tensor, Tensor, Tensor | None]]


class DatasetStream(BatchStream):
    """An endless, seekable sequence of batches over a Dataset: each epoch shows every item once.

    - `dataset`: item i is (inputs (L,), targets (L,)); shorter rows of a batch are padded at their end, with targets
      that do not count. Items may be asked for from several threads at once.
    - `shuffle`: False keeps the dataset's order. The last batch of an epoch takes its missing rows from the next.
    - `fingerprint`: what identifies the data beside its length: a resume with another of either is refused.
    - `collate`: items -> (inputs, targets, reset or None), (B, L) each.
    """

    def __init__(
        self,
        dataset: Items,
        batch_size: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        fingerprint: str = "",
        collate: Collate | None = None,
    ) -> None:
        if batch_size < 1 or len(dataset) < 1:
            raise ValueError(f"batch_size {batch_size}, {len(dataset)} items: expected at least 1 of each")
        self.dataset, self.batch_size, self.seed, self.shuffle = dataset, batch_size, seed, shuffle
        self.fingerprint, self.collate = fingerprint, collate or pad

    def batch(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}")
        inputs, targets, reset = self.collate([self.dataset[i] for i in self.items_of(index)])
        return Batch(inputs, targets, reset, self.cursor(index + 1))

    def items_of(self, index: int) -> list[int]:
        """The dataset's indices in a batch, in order."""
        count, found = len(self.dataset), []
        for number in range(index * self.batch_size, (index + 1) * self.batch_size):
            epoch, place = divmod(number, count)
            key = derive_key(self.seed, epoch, _KEY)
            found.append(int(permute(np.array([place]), count, key)[0]) if self.shuffle else place)
        return found

    @property
    def rows_per_epoch(self) -> int:
        return len(self.dataset)

    def settings(self) -> Cursor:
        return {"shuffle": int(self.shuffle)}

    def identity(self) -> Identity:
        """A dataset is known by its length and its fingerprint."""
        return [{"name": "dataset", "start": 0, "tokens": len(self.dataset), "sha256": self.fingerprint}]

    def describe(self) -> str:
        kind = type(self.dataset).__name__
        return f"{len(self.dataset):,} items of a {kind}, {self.steps_per_epoch:,.1f} steps an epoch"


def pad(items: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Items (inputs (L, ...), targets (L,)) as rows of one length: inputs end in zeros, targets in -100."""
    pairs = [(torch.as_tensor(item[0]), torch.as_tensor(item[1])) for item in items]
    for inputs, targets in pairs:
        if len(inputs) != len(targets):
            raise UserError(
                f"the dataset's item has {len(inputs)} inputs and {len(targets)} targets: expected equal lengths"
            )
    rows, labels = ([pair[side] for pair in pairs] for side in (0, 1))
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return padded, torch.nn.utils.rnn.pad_sequence(labels, batch_first=True, padding_value=IGNORED), None
