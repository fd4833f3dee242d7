"""The order of training windows as a pure function of (seed, epoch, index), and the cursor that stands in it.

A window is `seq_len + 1` tokens of one shard; neighbours share one token, so every transition of a shard is trained
once an epoch, but for a tail shorter than a window. Row r of batch b is window number `b * batch_size + r` of an
endless sequence, in which each epoch is one arrangement of all windows: a batch that the end of an epoch leaves
unfilled takes its remaining rows from the next one, and nothing is dropped or repeated. Epoch and position follow by
division, so any batch is computed without replaying, and a position is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from protomamba.data.order import derive_key, permute, shuffled
from protomamba.data.stream import BatchStream, Identity
from protomamba.data.windows import Batch, Cursor, make_batch, read_windows, window_counts
from protomamba.words import counted

if TYPE_CHECKING:
    from protomamba.data.shards import ShardSet

# Keys of the two kinds of shuffling; they only have to differ.
_WINDOWS, _SHARDS = 1, 2


@dataclass(frozen=True)
class _Epoch:
    """One epoch's arrangement of shards: `order` of their numbers, and how many windows stand `before` each."""

    number: int
    order: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]


class TokenStream(BatchStream):
    """An endless, seekable sequence of batches over a ShardSet.

    `packed`: the rows are consecutive windows of one contiguous run, through the shards in an order that
    `shuffle_shards` draws anew each epoch. Not `packed`: the windows of all shards in an order drawn anew each epoch.
    With `eos_token` and `reset_at_eos` the batches say where documents begin. UserError if no shard holds a window.
    """

    def __init__(
        self,
        shards: ShardSet,
        *,
        batch_size: int,
        seq_len: int,
        seed: int,
        packed: bool = True,
        shuffle_shards: bool = True,
        eos_token: int | None = None,
        reset_at_eos: bool = False,
    ) -> None:
        if batch_size < 1 or seq_len < 1:
            raise ValueError(f"batch_size {batch_size} and seq_len {seq_len}: expected at least 1")
        if reset_at_eos and eos_token is None:
            raise ValueError("reset_at_eos needs an eos_token")
        self.shards, self.batch_size, self.seq_len, self.seed = shards, batch_size, seq_len, seed
        self.packed, self.shuffle_shards = packed, shuffle_shards
        self.eos_token, self.reset_at_eos = eos_token, reset_at_eos
        self._windows = window_counts(shards, seq_len)
        self._fingerprint = shards.fingerprint()
        self._epoch_memo: _Epoch | None = None

    @property
    def rows_per_epoch(self) -> int:
        """Windows in all shards."""
        return int(self._windows.sum())

    @property
    def dropped_tokens(self) -> int:
        """Transitions that no window holds: the tails of the shards."""
        transitions = sum(shard.tokens - 1 for shard in self.shards.shards)
        return transitions - self.rows_per_epoch * self.seq_len

    def describe(self) -> str:
        empty = int((self._windows == 0).sum())
        short = f", {counted(empty, 'shard')} shorter than a window" if empty else ""
        return (
            f"{self.shards.tokens:,} tokens in {counted(len(self.shards), 'shard')}, "
            f"{counted(self.rows_per_epoch, 'window')} of {self.seq_len:,} an epoch ({self.steps_per_epoch:,.1f} "
            f"steps), {counted(self.dropped_tokens, 'token')} unused at the end{short}"
        )

    def batch(self, index: int) -> Batch:
        if index < 0:
            raise IndexError(f"batch {index}")
        tokens = read_windows(self.shards, self._rows(index), self.seq_len)
        return make_batch(tokens, self.eos_token if self.reset_at_eos else None, self.cursor(index + 1))

    def _rows(self, index: int) -> list[tuple[int, int]]:
        """Shard and window in it of each row of a batch."""
        rows: list[tuple[int, int]] = []
        while len(rows) < self.batch_size:
            epoch, place = divmod(index * self.batch_size + len(rows), self.rows_per_epoch)
            count = min(self.batch_size - len(rows), self.rows_per_epoch - place)
            rows += self._locate(epoch, np.arange(place, place + count))
        return rows

    def _locate(self, number: int, places: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Shard and window of some places of one epoch."""
        epoch = self._epoch(number)
        if not self.packed:
            places = permute(places, self.rows_per_epoch, derive_key(self.seed, number, _WINDOWS))
        slots = np.searchsorted(epoch.before, places, side="right") - 1
        return zip(epoch.order[slots].tolist(), (places - epoch.before[slots]).tolist(), strict=True)

    def _epoch(self, number: int) -> _Epoch:
        memo = self._epoch_memo
        if memo is not None and memo.number == number:
            return memo
        order = np.arange(len(self.shards))
        if self.packed and self.shuffle_shards:
            order = shuffled(len(self.shards), derive_key(self.seed, number, _SHARDS))
        before = np.concatenate(([0], np.cumsum(self._windows[order])[:-1]))
        # A memo of a pure function: whichever thread writes last, what is read is right.
        self._epoch_memo = _Epoch(number, order, before)
        return self._epoch_memo

    def settings(self) -> Cursor:
        return {
            "seq_len": self.seq_len,
            "packed": int(self.packed),
            "shuffle_shards": int(self.shuffle_shards),
            "eos_token": -1 if self.eos_token is None else self.eos_token,
            "reset_at_eos": int(self.reset_at_eos),
            "data": self._fingerprint,
        }

    def identity(self) -> Identity:
        return self.shards.identity()
