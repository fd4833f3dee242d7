"""The same over real sockets, between processes; and what the others see when one of them fails."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch

from protomamba.machine import by_core
from protomamba.train.comm import Local
from protomamba.train.comm_watch import RankFailed, Watch
from tests.distributed.launch import outcome, started
from tests.distributed.test_sums import SHAPES, summed, whole
from tests.marks import slow
from tests.runs import assert_equal

WORKER = ["-m", "tests.distributed.worker"]


def saved(folder: Path, world: int) -> list[Any]:
    return [torch.load(folder / f"rank-{rank}.pt", weights_only=False) for rank in range(world)]


def test_sums_and_weights_over_gloo_are_those_of_one_process(tmp_path: Path) -> None:
    with started(3, [*WORKER, "sums_and_weights", str(tmp_path)]) as processes:
        assert [outcome(process) for process in processes] == [(0, "")] * 3
    pieces, squares, small = summed(Local())
    found = [each for each, _ in saved(tmp_path, 3)]
    assert_equal(whole([each[0] for each in found]), whole([pieces]), "sums")
    assert_equal([each[1:] for each in found], [(squares, small)] * 3, "squares and small sums")
    one, *others = [weights for _, weights in saved(tmp_path, 3)]
    assert_equal(others, [one] * 2, "weights")
    assert {float(v) for name in SHAPES for v in one[name].unique()} == {1.0, 2.0, 3.0}


def test_ranks_keep_to_cores_of_their_own(tmp_path: Path) -> None:
    with started(2, [*WORKER, "cores", str(tmp_path)]) as processes:
        assert [outcome(process) for process in processes] == [(0, "")] * 2
    (before, one), (_, other) = saved(tmp_path, 2)
    assert one == one[:1] * len(one) and other == other[:1] * len(other) and len(one) >= 5
    if len(by_core(before)) > 1:
        assert not one[0] & other[0] and one[0] | other[0] == before
    else:
        assert one[0] == other[0] == before


@pytest.mark.parametrize(
    ("task", "reason"),
    [
        ("killed", "rank 1 gone without an error message: killed (out of memory?), or its machine or link is down\n"),
        slow("raises", "rank 1: no-such-file.bin: cannot be read\n"),
        slow("stopped", "no response from rank 1 for 7 s\n"),
        slow("without_memory", "rank 1: RuntimeError: [enforce fail at alloc_cpu.cpp"),
    ],
)
def test_the_others_say_why_a_rank_failed(task: str, reason: str, tmp_path: Path) -> None:
    with started(3, [*WORKER, task, str(tmp_path), "--impatient"]) as processes:
        for survivor in (processes[0], processes[2]):
            code, errors = outcome(survivor)
            assert code == 1 and errors.startswith(f"error: {reason}"), errors


@pytest.mark.slow
def test_a_rank_that_never_starts_is_named(tmp_path: Path) -> None:
    with started(3, [*WORKER, "sums_and_weights", str(tmp_path), "--impatient"], absent=(1,)) as processes:
        found = [outcome(process) for process in processes]
    assert found == [(1, "error: rank 1 of 3 did not start within 5 s\n")] * 2


def test_roll_call_names_the_ranks_that_are_missing() -> None:
    store = torch.distributed.HashStore()
    store.set("here/2", "1")
    with pytest.raises(RankFailed, match=r"ranks 1, 3 of 4 did not start within 0.1 s"):
        Watch(store, 0, 4).roll_call(0.1)


def test_a_rank_without_a_sign_of_life_is_named() -> None:
    store = torch.distributed.HashStore()
    one = Watch(store, 0, 3, silence_s=0.2)
    store.set("beat/1", "1")
    store.set("beat/2", "1")
    one.check()
    time.sleep(0.3)
    store.set("beat/1", "later")
    with pytest.raises(RankFailed, match=r"^no response from rank 2 for 0.2 s$"):
        one.check()


def test_the_first_reason_stands() -> None:
    store = torch.distributed.HashStore()
    one, other = Watch(store, 0, 2), Watch(store, 1, 2)
    other.give_up("out of memory")
    one.give_up("a broken connection")
    with pytest.raises(RankFailed, match=r"^rank 1: out of memory$"):
        one.check()
