"""Workers: in order whatever their number, errors in their turn, a dead one replaced, and no hang at any end."""

from __future__ import annotations

import itertools
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from protomamba.data import Batch, Prefetcher, prefetch
from protomamba.errors import UserError

WORKERS = [0, 1, 2, 4]


class Source:
    """Batches that hold their index; `broken` ones raise."""

    def __init__(self, broken: Mapping[int, BaseException] | None = None) -> None:
        self.position = 0
        self.broken = dict(broken or {})
        self.asked: list[int] = []

    def batch(self, index: int) -> Batch:
        self.asked.append(index)
        if index in self.broken:
            raise self.broken[index]
        tokens = torch.full((1, 1), index)
        return Batch(tokens, tokens, None, {"batch": index + 1})

    def state_dict(self) -> dict[str, Any]:
        return {"batch": self.position}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.position = state["batch"]


def take(batches: Prefetcher, count: int) -> list[int]:
    return [int(next(batches).tokens_BL) for _ in range(count)]


@pytest.mark.parametrize("workers", WORKERS)
@pytest.mark.parametrize("buffer", [1, 2, 16])
def test_batches_come_in_order_and_the_buffer_is_bounded(workers: int, buffer: int) -> None:
    source = Source()
    with Prefetcher(source, workers, buffer) as batches:
        assert take(batches, 50) == list(range(50))
        assert batches.state_dict() == {"batch": 50}
    assert max(source.asked) < 50 + buffer
    assert len(source.asked) == len(set(source.asked)), "no batch is made twice"
    assert not [thread for thread in threading.enumerate() if thread.name == "protomamba-prefetch"]


@pytest.mark.parametrize("workers", WORKERS)
def test_it_follows_a_position_set_from_outside(workers: int) -> None:
    source = Source()
    with Prefetcher(source, workers, 4) as batches:
        assert take(batches, 3) == [0, 1, 2]
        batches.load_state_dict({"batch": 40})
        assert take(batches, 3) == [40, 41, 42]
        source.position = 1
        assert take(batches, 3) == [1, 2, 3]


@pytest.mark.parametrize("workers", WORKERS)
def test_an_error_comes_in_its_turn_and_again_when_asked_again(workers: int) -> None:
    source = Source({3: UserError("a.bin: shrank")})
    with Prefetcher(source, workers, 8) as batches:
        assert take(batches, 3) == [0, 1, 2]
        for _ in range(2):
            with pytest.raises(UserError, match=r"a.bin: shrank"):
                next(batches)
            assert source.position == 3
        source.broken.clear()
        assert take(batches, 3) == [3, 4, 5]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), MemoryError()])
def test_an_error_that_would_end_a_thread_ends_the_run_instead_of_hanging_it(error: BaseException) -> None:
    with Prefetcher(Source({1: error}), 2, 4) as batches:
        assert take(batches, 1) == [0]
        with pytest.raises(type(error)):
            next(batches)


def test_a_dead_worker_is_replaced_and_its_batch_made_by_another(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefetch, "CHECK_SECONDS", 0.01)
    work, lives, deaths = prefetch._work, itertools.count(), []

    def dies_at_first(shared: Any) -> None:
        if next(lives) < 3:
            deaths.append(shared.claim())  # takes a batch on and is never heard of again
        else:
            work(shared)

    monkeypatch.setattr(prefetch, "_work", dies_at_first)
    with Prefetcher(Source(), 2, 4) as batches:
        assert take(batches, 20) == list(range(20))
    assert len(deaths) == 3


def test_a_closed_prefetcher_says_so() -> None:
    batches = Prefetcher(Source(), 1, 4)
    take(batches, 1)
    batches.close()
    batches.close()
    with pytest.raises(ValueError, match="closed"):
        next(batches)
    for bad in ((-1, 1), (1, 0)):
        with pytest.raises(ValueError, match="expected at least"):
            Prefetcher(Source(), *bad)


ABANDONED = """
import sys, threading
sys.path[:0] = {paths!r}
from protomamba.data import Prefetcher, TokenStream, in_memory
stream = TokenStream(in_memory(range(1000)), batch_size=2, seq_len=8, seed=0)
if {stuck}:
    batch = stream.batch
    stream.batch = lambda index: batch(index) if index < 4 else threading.Event().wait()
batches = Prefetcher(stream, 2, 4)
print(next(batches).tokens_BL.shape)
{end}
"""


@pytest.mark.parametrize(
    ("stuck", "end", "code"), [(True, "", 0), (True, "raise KeyboardInterrupt", -2), (False, "del batches", 0)]
)
def test_a_program_ends_without_closing_it_even_with_stuck_workers(stuck: bool, end: str, code: int) -> None:
    source = str(Path(prefetch.__file__).parents[2])
    program = ABANDONED.format(paths=[source], stuck=stuck, end=end)
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert found.returncode in (code, 130 if code == -2 else code), found.stderr
    assert "torch.Size([2, 8])" in found.stdout
    assert "Fatal" not in found.stderr
