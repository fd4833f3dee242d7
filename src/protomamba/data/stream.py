"""The base of training streams: batches that are functions of their index, and one integer for the position."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from protomamba.data.windows import Batch, Cursor
from protomamba.errors import UserError

STATE_VERSION = 1
_PLACE = ("batch", "epoch", "window", "shards")
Identity = list[dict[str, int | str]]


class BatchStream(ABC):
    """An endless sequence of batches. Iterating continues from `position`, the index of the next batch.

    `state_dict` is that position with all that the order depends on: plain integers and strings.
    """

    batch_size: int
    seed: int
    position = 0

    @abstractmethod
    def batch(self, index: int) -> Batch:
        """Batch number `index` (from 0); a pure function, safe in any thread."""

    def __getitem__(self, index: int) -> Batch:
        return self.batch(index)

    def cursor(self, index: int) -> Cursor:
        """The position before batch `index`, with all that the order depends on; the same keys at every index."""
        epoch, window = divmod(index * self.batch_size, self.rows_per_epoch)
        place = {"version": STATE_VERSION, "batch": index, "epoch": epoch, "window": window}
        return {**place, "batch_size": self.batch_size, "seed": self.seed, **self.settings()}

    @property
    @abstractmethod
    def rows_per_epoch(self) -> int:
        """Rows until the data has been seen once; batches go on over the end of an epoch."""

    @abstractmethod
    def settings(self) -> Cursor:
        """What the order depends on besides batch size and seed."""

    @abstractmethod
    def identity(self) -> Identity:
        """Name, range and checksum of every file, in order."""

    @abstractmethod
    def describe(self) -> str:
        """One line for the header of a run."""

    @property
    def steps_per_epoch(self) -> float:
        """Batches until the data has been seen once."""
        return self.rows_per_epoch / self.batch_size

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        batch = self.batch(self.position)
        self.position += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The cursor of the next batch and the identity of every file."""
        return {**self.cursor(self.position), "shards": self.identity()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved position. UserError naming each setting or file that has changed."""
        mine = self.state_dict()
        if state.get("version") != STATE_VERSION:
            raise UserError(f"stream cursor: version {state.get('version')!r}, expected {STATE_VERSION}")
        missing = sorted(mine.keys() - state.keys())
        if missing:
            raise UserError(f"stream cursor: damaged: no {', '.join(missing)}")
        refuse_other_data(state["shards"], mine["shards"])
        changed = [key for key in mine if key not in _PLACE and state[key] != mine[key]]
        if changed:
            listed = ", ".join(f"{key} {state[key]} (now {mine[key]})" for key in changed)
            raise UserError(f"stream cursor: made with {listed}; resume with the same settings or start a new run")
        batch = state["batch"]
        if not isinstance(batch, int) or batch < 0 or self.cursor(batch) != {key: state[key] for key in self.cursor(0)}:
            raise UserError(
                f"stream cursor: damaged: batch {batch!r}, epoch {state['epoch']!r}, window {state['window']!r}"
            )
        self.position = batch


def refuse_other_data(saved: Sequence[Mapping[str, Any]], found: Sequence[Mapping[str, Any]]) -> None:
    """Raise UserError naming the first shard that has changed since the cursor was saved."""
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
