"""Sums of gradients: the same bits on any number of ranks, whatever is missing, tall, small or empty."""

from __future__ import annotations

import contextlib
import gc
import operator
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from protomamba.errors import ConfigError, UserError
from protomamba.train.comm import Comm, Local
from protomamba.train.comm_messages import FRAME, HEAD
from protomamba.train.comm_reduce import _filled_rows
from tests.distributed.threads import Mail, ranks
from tests.runs import assert_equal

SHAPES = {
    "tall": (4_099, 24),
    "square": (160, 160),
    "vector": (33,),
    "scale": (),
    "unused": (7, 5),
    "tall_full": (900, 40),
}
COUNT = 8


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.zeros(shape)) for name, shape in SHAPES.items()}


def shard_gradients(shard: int) -> dict[str, Tensor]:
    """What shard `shard` finds: few rows of the tall one, with zeros of both signs; nothing at all in shard 5."""
    draw = torch.Generator().manual_seed(shard)
    found = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items() if name != "unused"}
    rows = torch.randint(SHAPES["tall"][0], (40,), generator=draw)
    tall = torch.zeros(SHAPES["tall"])
    tall[rows] = found["tall"][rows]
    tall[rows[0], :3], tall[7, 2] = torch.tensor([-0.0, 0.0, -1e-45]), -0.0
    found["tall"] = tall
    if shard == 3:
        del found["square"]
    return {} if shard == 5 else found


def summed(comm: Comm) -> tuple[dict[Any, Any], Any, list[float]]:
    """The pieces this rank owns after one sum, their squares, and sums of small things."""
    named = parameters()
    comm.partition(named)
    comm.open(COUNT)
    for shard in comm.shards(COUNT):
        found = shard_gradients(shard)
        for name in reversed(found):  # as a backward pass would, one after another
            comm.start(shard, {name: found[name]})
    comm.finish()
    pieces = {}
    for piece in comm.pieces():
        gradient = named[piece.name].grad
        pieces[piece.name, piece.start] = None if gradient is None else piece.of(gradient).clone()
    rows = [(0.1 * shard, 1e16 if shard == 2 else 1) for shard in comm.shards(COUNT)]
    return pieces, comm.square_sums(), comm.sums(torch.tensor(rows, dtype=torch.float64)).tolist()


def whole(parts: list[dict[Any, Tensor | None]]) -> dict[str, Tensor | None]:
    """Parameters from the pieces of all ranks."""
    found: dict[str, list[Tensor | None]] = {}
    for part in parts:
        for (name, _), piece in part.items():
            found.setdefault(name, []).append(piece)
    return {
        name: None if pieces[0] is None else torch.cat([piece for piece in pieces if piece is not None])
        for name, pieces in found.items()
    }


@pytest.mark.parametrize("world", [2, 3, 4, 5, 8])
def test_the_same_bits_on_any_number_of_ranks(world: int) -> None:
    pieces, squares, small = summed(Local())
    alone = whole([pieces])
    assert alone["unused"] is None and alone["square"] is not None
    found = ranks(world, summed)
    assert_equal(whole([pieces for pieces, _, _ in found]), alone, "sums")
    for _, other_squares, other_small in found:
        assert_equal(other_squares, squares, "squares")
        assert_equal(other_small, small, "small sums")


@contextlib.contextmanager
def slow_collections(threshold: int) -> Iterator[None]:
    """The garbage collector runs after so many new objects, and lets other threads in."""

    def pause(phase: str, facts: dict[str, int]) -> None:
        time.sleep(0.005)

    before = gc.get_threshold()
    gc.collect()
    gc.callbacks.append(pause)
    gc.set_threshold(threshold)
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.callbacks.remove(pause)


@pytest.mark.parametrize("threshold", [40, 41])  # one of them is reached by a box, the other by its key
def test_sender_and_receiver_find_one_box(threshold: int) -> None:
    """Also where the other thread runs while a box is being made."""
    mail = Mail()
    with slow_collections(threshold), ThreadPoolExecutor(2) as pool:
        sent, received = pool.map(lambda _: [mail.box(0, 1, tag) for tag in range(3_000)], range(2))
    assert all(map(operator.is_, sent, received))


def test_the_sum_is_the_tree_s() -> None:
    pieces, _, _ = summed(Local())
    leaves = [shard_gradients(shard).get("square", torch.zeros(SHAPES["square"])) for shard in range(COUNT)]
    while len(leaves) > 1:
        leaves = [a + b for a, b in zip(leaves[::2], leaves[1::2], strict=True)]
    assert_equal(pieces["square", 0], leaves[0].view(-1), "square")


def test_one_shard_keeps_its_gradient_as_it_is() -> None:
    named, comm = parameters(), Local()
    comm.partition(named)
    comm.open(1)
    given = shard_gradients(0)
    addresses = {name: gradient.data_ptr() for name, gradient in given.items()}
    comm.start(0, given)
    comm.finish()
    kept = {name: p.grad.data_ptr() for name, p in named.items() if p.grad is not None}
    assert kept == addresses


def test_a_tall_gradient_travels_as_rows() -> None:
    def sent(comm: Comm) -> int:
        named = {"tall": nn.Parameter(torch.zeros(SHAPES["tall"]))}
        comm.partition(named)
        comm.open(comm.world)
        comm.start(comm.rank, {"tall": shard_gradients(comm.rank)["tall"]})
        comm.finish()
        return comm.mesh.sent_bytes

    assert max(ranks(2, sent)) < 40 * (24 * 4 + 8) + 64 + FRAME


@pytest.mark.parametrize("world", [1, 2, 3])
def test_updated_weights_reach_every_rank(world: int) -> None:
    def updated(comm: Comm) -> dict[str, Tensor]:
        named = parameters()
        comm.partition(named)
        draw = torch.Generator().manual_seed(1)
        target = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
        with torch.no_grad():
            for piece in comm.pieces():
                piece.of(named[piece.name].detach()).copy_(piece.of(target[piece.name]))
        comm.all_gather_weights()
        assert_equal({name: p.detach() for name, p in named.items()}, target, "weights")
        return target

    ranks(world, updated)


def test_more_ranks_than_shards_are_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"3 ranks for 2 gradient shards.*--grad-shards 3"):
        ranks(3, lambda comm: comm.shards(2))


def test_facts_that_differ_are_told_with_rank_and_values() -> None:
    def agree(comm: Comm) -> None:
        comm.agree({"torch": "2.13", "threads": "1" if comm.rank < 2 else "4"})

    with pytest.raises(UserError, match="threads: rank 2 has 4, rank 0 has 1"):
        ranks(3, agree)
    ranks(2, agree)


def test_gathered_tensors_come_in_the_order_of_the_ranks() -> None:
    def gather(comm: Comm) -> list[list[int]]:
        return [part.tolist() for part in comm.all_gather(torch.arange(comm.rank * 2).view(-1, 2))]

    assert ranks(3, gather) == [[[], [[0, 1]], [[0, 1], [2, 3]]]] * 3


def test_gathered_tensors_may_be_longer_than_a_frame() -> None:
    """Two exchanges, as the receive of the second is posted by the first."""
    most = (FRAME - HEAD) // 8

    def gather(comm: Comm) -> list[Tensor]:
        sizes = (most, most + 1, 0) if comm.rank == 0 else (2 * FRAME, 1, most + comm.rank)
        return [part for size in sizes for part in comm.all_gather(torch.arange(size) + comm.rank)]

    sizes = [(most, *[2 * FRAME] * 2), (most + 1, 1, 1), (0, most + 1, most + 2)]
    expected = [torch.arange(size) + rank for each in sizes for rank, size in enumerate(each)]
    for found in ranks(3, gather):
        assert_equal(found, expected, "parts")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_row_is_empty_only_if_every_bit_is_zero(dtype: torch.dtype) -> None:
    """Minus zero, the smallest number and NaN are something, as they are to a sum or to the one who finds a NaN."""
    value = torch.zeros(11, 3, dtype=dtype)
    value[1, 0], value[4, 1], value[9, 2] = -0.0, torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps, torch.nan
    rows = _filled_rows(value)
    assert rows is not None and rows.tolist() == [1, 4, 9]
    assert _filled_rows(torch.ones(2, 3, dtype=dtype)) is None
