"""Blocks: all of every parameter once, cut where no vector register is, shared out evenly."""

from __future__ import annotations

import pytest
import torch

from protomamba.train.comm_layout import BLOCK, LANES, Layout, Piece, blocks

SHAPES = {
    "embedding": (5_000, 96),
    "layers.0.in_proj": (768, 160),
    "layers.0.D": (320,),
    "scale": (),
    "odd": (70_001, 3),
}


@pytest.mark.parametrize("world", [1, 2, 3, 8, 40])
def test_every_element_is_owned_once(world: int) -> None:
    layout = Layout(SHAPES, world)
    seen = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for pieces in layout.pieces:
        for piece in pieces:
            piece.of(seen[piece.name]).add_(1)
    assert all(bool((times == 1).all()) for times in seen.values())
    assert layout.owner == sorted(layout.owner)


def test_the_blocks_do_not_know_the_ranks() -> None:
    assert Layout(SHAPES, 1).blocks == Layout(SHAPES, 8).blocks == blocks(SHAPES)


def test_a_cut_is_at_a_multiple_of_the_lanes() -> None:
    for block in blocks(SHAPES):
        width = block.numel // max(1, block.stop - block.start)
        assert block.start * width % LANES == 0
        assert block.numel <= BLOCK + LANES * width


def test_a_vector_is_one_piece() -> None:
    assert blocks({"long": (1_000_000,)}) == [Piece("long", 0, 1, 1_000_000)]


def test_ranks_own_about_the_same() -> None:
    owned = [sum(piece.numel for piece in pieces) for pieces in Layout(SHAPES, 4).pieces]
    assert max(owned) - min(owned) <= 2 * BLOCK + LANES * 160
