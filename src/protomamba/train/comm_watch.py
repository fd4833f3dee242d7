"""What the ranks tell each other outside of the sums: who is here, who is alive, and why one has given up.

All of it is in the store of torch's launcher, which outlives a rank: a rank that fails writes its reason there, the
first reason stands, and every other rank shows that one instead of its own broken connection.
"""

from __future__ import annotations

import contextlib
import threading
import time
from typing import Protocol

from protomamba.errors import UserError

# A rank that is missing at the start is waited for this long.
START_S = 120.0
# How often a rank says that it is alive, and after how long a silence the others give up.
BEAT_S, SILENCE_S = 2.0, 20.0
# How long a rank whose connection broke waits for the reason of the one that broke it.
REASON_S = 5.0


class RankFailed(UserError):
    """Another rank has failed, stopped answering or never started."""


class Store(Protocol):
    """What is used of torch.distributed's stores."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def compare_set(self, key: str, expected: str, desired: str) -> bytes: ...


class Watch:
    """One rank's view of the others. `start` begins to tell them that it is alive."""

    def __init__(self, store: Store, rank: int, world: int, silence_s: float = SILENCE_S) -> None:
        self.store, self.rank, self.world, self.silence_s = store, rank, world, silence_s
        self._seen: dict[int, tuple[bytes, float]] = {}
        self._stop = threading.Event()

    def roll_call(self, wait_s: float = START_S) -> None:
        """Wait until every rank has started; RankFailed with the numbers of those that have not."""
        self.store.set(f"here/{self.rank}", "1")
        deadline = time.monotonic() + wait_s
        missing = list(range(self.world))
        while missing := [rank for rank in missing if not self.store.check([f"here/{rank}"])]:
            if time.monotonic() > deadline:
                raise RankFailed(f"{_ranks(missing)} of {self.world} did not start within {wait_s:g} s")
            time.sleep(0.05)

    def start(self) -> None:
        threading.Thread(target=self._beat, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._stop.set()

    def _beat(self) -> None:
        count = 0
        # The store ends with the launcher; then no rank is left to report to.
        with contextlib.suppress(RuntimeError):
            while not self._stop.is_set():
                self.store.set(f"beat/{self.rank}", str(count))
                count += 1
                self._stop.wait(BEAT_S)

    def last_words(self, error: BaseException) -> None:
        """Tell the others what ends this rank, if it is not they that do."""
        if not isinstance(error, RankFailed):
            self.give_up(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def give_up(self, reason: str) -> None:
        """Tell the others why this rank ends. The first reason of all stands."""
        self._accuse(f"rank {self.rank}: {reason}")

    def _accuse(self, reason: str) -> None:
        with contextlib.suppress(RuntimeError):
            self.store.compare_set("reason", "", reason)

    def check(self) -> None:
        """RankFailed where another rank has given up, or has said nothing for `silence_s`."""
        try:
            if self.store.check(["reason"]):
                raise RankFailed(self.store.get("reason").decode())
            silent = self._silent(self.silence_s)
        except RuntimeError as error:
            raise RankFailed("the launcher is gone (its store does not respond)") from error
        if silent:
            self._accuse(reason := f"no response from {_ranks(silent)} for {self.silence_s:g} s")
            raise RankFailed(reason)

    def _silent(self, limit_s: float) -> list[int]:
        """The ranks that have said nothing for this long, as far as this rank has looked."""
        now = time.monotonic()
        for rank in set(range(self.world)) - {self.rank}:
            beat = self.store.get(f"beat/{rank}") if self.store.check([f"beat/{rank}"]) else b""
            if rank not in self._seen or self._seen[rank][0] != beat:
                self._seen[rank] = beat, now
        return sorted(rank for rank, (_, since) in self._seen.items() if now - since > limit_s)

    def explain(self, error: Exception) -> RankFailed:
        """Why a connection broke: the reason that a rank gave, or else which ranks have fallen silent with it."""
        self._seen = {}
        deadline = time.monotonic() + REASON_S
        try:
            while time.monotonic() < deadline:
                self.check()
                time.sleep(0.1)
            gone = self._silent(2 * BEAT_S)
        except (RankFailed, RuntimeError) as found:
            return found if isinstance(found, RankFailed) else RankFailed(str(found))
        who = f"{_ranks(gone)} gone" if gone else f"the link to another rank broke ({error})"
        self._accuse(
            reason := f"{who} without an error message: killed (out of memory?), or its machine or link is down"
        )
        return RankFailed(reason)


def _ranks(numbers: list[int]) -> str:
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
