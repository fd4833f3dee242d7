"""The tree: its shape, how much of it a run of leaves can add up alone, and that who adds does not matter."""

from __future__ import annotations

import gc
import random
import weakref

import pytest
import torch
from torch import Tensor

from protomamba.train.comm_tree import Partials, children, fold, nodes, share


def written_out(leaves: list[str]) -> str:
    """The tree's definition: pairs of each level, a lone one carried up."""
    while len(leaves) > 1:
        pairs = [f"({a}+{b})" for a, b in zip(leaves[::2], leaves[1::2], strict=False)]
        leaves = pairs + leaves[len(leaves) - len(leaves) % 2 :]
    return leaves[0]


def join(a: str, b: str) -> str:
    return f"({a}+{b})"


@pytest.mark.parametrize("count", range(1, 34))
def test_the_tree_is_the_one_that_is_written_down(count: int) -> None:
    leaves = {(i, i + 1): str(i) for i in range(count)}
    assert fold(leaves, count, join) == written_out([str(i) for i in range(count)])


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8, 12, 31])
def test_any_number_of_ranks_builds_the_same_tree(count: int) -> None:
    for world in range(1, count + 1):
        parts = {}
        for rank in range(world):
            own = Partials[str](share(count, world, rank), count, join)
            told = [own.push(str(leaf)) for leaf in own.leaves]
            assert {node: value for each in told for node, value in each.items()} == own.done
            assert list(own.done) == nodes(own.leaves, count)
            parts |= own.done
        assert fold(parts, count, join) == written_out([str(i) for i in range(count)]), world


def test_a_node_is_told_as_soon_as_no_leaf_of_this_rank_can_join_it() -> None:
    own = Partials[str](range(2, 5), 8, join)
    assert own.push("2") == {}
    assert own.push("3") == {(2, 4): "(2+3)"}
    assert own.push("4") == {(4, 5): "4"}


def test_shares_are_those_of_array_split() -> None:
    assert [list(share(7, 3, part)) for part in range(3)] == [[0, 1, 2], [3, 4], [5, 6]]
    assert [list(share(2, 3, part)) for part in range(3)] == [[0], [1], []]
    assert children((4, 7)) == ((4, 6), (6, 7))


def test_another_order_would_have_other_bits() -> None:
    """The fixed tree is not there for nothing: the same numbers added from left to right differ."""
    draw = random.Random(1)
    values = [torch.tensor([draw.gauss(0, 1) for _ in range(512)]) for _ in range(8)]
    tree = fold({(i, i + 1): value for i, value in enumerate(values)}, 8, torch.add)
    straight: Tensor = values[0]
    for value in values[1:]:
        straight = straight + value
    assert not torch.equal(tree, straight)


def test_what_was_added_up_is_freed_at_once() -> None:
    """A step's sums and messages are as large as the model: they must not wait for the garbage collector."""
    parts = {(i, i + 1): torch.ones(2) for i in range(3)}
    kept = [weakref.ref(each) for each in parts.values()]
    gc.disable()
    try:
        fold(parts, 3, torch.add)
        del parts
        assert [each() for each in kept] == [None] * 3
    finally:
        gc.enable()
