"""How ranks share out the cores of a machine."""

from __future__ import annotations

import pytest

from protomamba.train.comm_cores import Place, may_bind, own_share

PAIRS = [[0, 4], [1, 5], [2, 6], [3, 7]]


def place(machine: str = "one", cores: list[list[int]] = PAIRS, threads: int = 1) -> Place:
    return Place(machine, cores, threads)


@pytest.mark.parametrize(
    ("places", "shares"),
    [
        ([place()] * 2, [{0, 4, 1, 5}, {2, 6, 3, 7}]),
        ([place()] * 3, [{0, 4}, {1, 5}, {2, 6, 3, 7}]),
        ([place(threads=2)] * 4, [{0, 4}, {1, 5}, {2, 6}, {3, 7}]),
        ([place("one"), place("two"), place("one")], [{0, 4, 1, 5}, None, {2, 6, 3, 7}]),
        ([place()], [None]),
        ([place()] * 5, [None] * 5),  # more ranks than cores
        ([place(threads=3)] * 4, [None] * 4),  # more threads than a share has processors
        ([place(threads=3), place()] * 2, [None] * 4),
        ([place(cores=[[0, 4]]), place(cores=[[1, 5]])], [None] * 2),  # bound already, by whoever started them
    ],
)
def test_shares(places: list[Place], shares: list[set[int] | None]) -> None:
    assert [own_share(places, rank) for rank in range(len(places))] == shares


def test_openmps_variable_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert may_bind()
    monkeypatch.setenv("OMP_PROC_BIND", "FALSE")
    assert not may_bind()
