"""The order of training windows as a pure function of (seed, epoch, index), and the cursor that stands in it.

A window is `seq_len + 1` tokens of one shard; neighbours share one token, so every transition of a shard is trained
once an epoch, but for a tail shorter than a window. Row r of batch b is window number `b * batch_size + r` of an
endless sequence, in which each epoch is one arrangement of all windows: a batch that the end of an epoch leaves
unfilled takes its remaining rows from the next one, and nothing is dropped or repeated. Epoch and position follow by
division, so any batch is computed without replaying, and a position is one integer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.order import derive_key, permute, shuffled
from protomamba.data.shards import ShardSet
from protomamba.data.windows import Batch, Cursor, make_batch, read_windows, window_counts
from protomamba.errors import UserError

STATE_VERSION = 1
# Keys of the two kinds of shuffling; they only have to differ.
_WINDOWS, _SHARDS = 1, 2


@dataclass(frozen=True)
class _Epoch:
    """One epoch's arrangement of shards: `order` of their numbers, and how many windows stand `before` each."""

    number: int
    order: npt.NDArray[np.int64]
    before: npt.NDArray[np.int64]


class TokenStream:
    """An endless, seekable sequence of batches over a ShardSet.

    `packed`: the rows are consecutive windows of one contiguous run, through the shards in an order that
    `shuffle_shards` draws anew each epoch. Not `packed`: the windows of all shards in an order drawn anew each epoch.
    With `eos_token` and `reset_at_eos` the batches say where documents begin. UserError if no shard holds a window.

    Iterating goes on from the stream's own position; `state_dict` is that position with all that the order depends on.
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
        self.position = 0  # the number of the next batch; the only thing that changes

    @property
    def windows_per_epoch(self) -> int:
        """Windows in all shards."""
        return int(self._windows.sum())

    @property
    def steps_per_epoch(self) -> float:
        """Batches in an epoch; a fraction, since batches may straddle epochs."""
        return self.windows_per_epoch / self.batch_size

    @property
    def dropped_tokens(self) -> int:
        """Transitions that no window holds: the tails of the shards."""
        transitions = sum(shard.tokens - 1 for shard in self.shards.shards)
        return transitions - self.windows_per_epoch * self.seq_len

    def describe(self) -> str:
        """One line for the head of a run."""
        empty = int((self._windows == 0).sum())
        short = f", {empty} shard(s) shorter than a window" if empty else ""
        return (
            f"{self.shards.tokens:,} tokens in {len(self.shards)} shard(s), {self.windows_per_epoch:,} windows of "
            f"{self.seq_len} an epoch ({self.steps_per_epoch:,.1f} steps), {self.dropped_tokens:,} tail tokens "
            f"unused{short}"
        )

    def batch(self, index: int) -> Batch:
        """Batch number `index` (from 0) of the endless sequence; a pure function, safe in any thread."""
        if index < 0:
            raise IndexError(f"batch {index}")
        tokens = read_windows(self.shards, self._rows(index), self.seq_len)
        return make_batch(tokens, self.eos_token if self.reset_at_eos else None, self.cursor(index + 1))

    def _rows(self, index: int) -> list[tuple[int, int]]:
        """Shard and window in it of each row of a batch."""
        rows: list[tuple[int, int]] = []
        while len(rows) < self.batch_size:
            epoch, place = divmod(index * self.batch_size + len(rows), self.windows_per_epoch)
            count = min(self.batch_size - len(rows), self.windows_per_epoch - place)
            rows += self._locate(epoch, np.arange(place, place + count))
        return rows

    def _locate(self, number: int, places: npt.NDArray[np.int64]) -> Iterator[tuple[int, int]]:
        """Shard and window of some places of one epoch."""
        epoch = self._epoch(number)
        if not self.packed:
            places = permute(places, self.windows_per_epoch, derive_key(self.seed, number, _WINDOWS))
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

    def cursor(self, index: int) -> Cursor:
        """The place before batch `index`, with all that the order depends on; the same keys at every index."""
        epoch, window = divmod(index * self.batch_size, self.windows_per_epoch)
        return {
            "version": STATE_VERSION,
            "batch": index,
            "epoch": epoch,
            "window": window,
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "seed": self.seed,
            "packed": int(self.packed),
            "shuffle_shards": int(self.shuffle_shards),
            "eos_token": -1 if self.eos_token is None else self.eos_token,
            "reset_at_eos": int(self.reset_at_eos),
            "data": self._fingerprint,
        }

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The cursor of the next batch and the identity of every shard: plain integers and strings."""
        return {**self.cursor(self.position), "shards": self.shards.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place. UserError naming each setting or shard that is not what it was."""
        mine = self.state_dict()
        if state.get("version") != STATE_VERSION:
            raise UserError(f"stream cursor: version {state.get('version')!r}, expected {STATE_VERSION}")
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise UserError(f"stream cursor: damaged: no {', '.join(missing)}")
        _refuse_other_data(state["shards"], mine["shards"])
        place = ("batch", "epoch", "window", "shards")
        changed = [key for key in mine if key not in place and state[key] != mine[key]]
        if changed:
            listed = ", ".join(f"{key} {state[key]} (now {mine[key]})" for key in changed)
            raise UserError(f"stream cursor: made with {listed}; resume with the same settings or start a new run")
        batch = state["batch"]
        if not isinstance(batch, int) or batch < 0 or self.cursor(batch) != {key: state[key] for key in self.cursor(0)}:
            raise UserError(
                f"stream cursor: damaged: batch {batch!r}, epoch {state['epoch']!r}, window {state['window']!r}"
            )
        self.position = batch


def _refuse_other_data(saved: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    """Name the first shard that is not what it was when the cursor was saved."""
    advice = "restore the data or start a new run"
    for number, (before, now) in enumerate(zip(saved, found, strict=False)):
        if before["name"] != now["name"]:
            raise UserError(f"data changed: shard {number} was {before['name']}, is now {now['name']}; {advice}")
        if before["sha256"] != now["sha256"]:
            raise UserError(
                f"data changed: shard {now['name']} has other contents than at the checkpoint: expected sha256 "
                f"{before['sha256'][:12]}, found {now['sha256'][:12]}; {advice}"
            )
        if (before["start"], before["tokens"]) != (now["start"], now["tokens"]):
            raise UserError(
                f"data changed: of shard {now['name']} {before['tokens']:,} tokens from {before['start']:,} were used, "
                f"now {now['tokens']:,} from {now['start']:,}: was --val-ratio changed? {advice}"
            )
    if len(saved) != len(found):
        longer = saved if len(saved) > len(found) else found
        state = "missing" if longer is saved else "new"
        raise UserError(f"data changed: shard {longer[min(len(saved), len(found))]['name']} is {state}; {advice}")
