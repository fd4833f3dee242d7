"""Which rank adds up and updates which rows of which parameter: fixed blocks, so that bits do not depend on the ranks.

The trainable parameters, one after another, are cut into blocks of whole rows. Each rank owns a run of blocks. A cut
lies at a multiple of LANES elements, so that an elementwise update in vector registers treats a piece as it would have
treated the whole parameter.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby

from torch import Tensor

BLOCK = 65_536
LANES = 64


@dataclass(frozen=True)
class Piece:
    """Rows start to stop of a parameter; a vector is one piece."""

    name: str
    start: int
    stop: int
    numel: int

    def of(self, tensor: Tensor) -> Tensor:
        """This piece of the parameter or of anything of its shape, contiguous, as a flat view."""
        flat = tensor.view(-1)
        width = self.numel // max(1, self.stop - self.start)
        return flat[self.start * width : self.start * width + self.numel]


def blocks(shapes: Mapping[str, tuple[int, ...]], whole: bool = False) -> list[Piece]:
    """All parameters in blocks of BLOCK elements or a little more; what is smaller or a vector is one block.

    whole: each parameter is one block, for an optimizer that looks at more than an element at a time.
    """
    return [block for name, shape in shapes.items() for block in _cut(name, shape, whole)]


def _cut(name: str, shape: tuple[int, ...], whole: bool) -> Iterator[Piece]:
    rows = shape[0] if len(shape) > 1 else 1
    width = math.prod(shape) // max(1, rows)
    unit = LANES // math.gcd(LANES, max(1, width))
    step = max(1, rows) if whole else unit * max(1, math.ceil(BLOCK / max(1, unit * width)))
    for start in range(0, max(1, rows), step):
        stop = min(start + step, rows)
        yield Piece(name, start, stop, (stop - start) * width)


def owners(pieces: Iterable[Piece], world: int) -> list[int]:
    """The rank of each block: a run of blocks each, of about the same number of elements."""
    pieces = list(pieces)
    total, before, found = max(1, sum(p.numel for p in pieces)), 0, []
    for piece in pieces:
        found.append(min(world - 1, (2 * before + piece.numel) * world // (2 * total)))
        before += piece.numel
    return found


def joined(pieces: Iterable[Piece]) -> list[Piece]:
    """Blocks in order, with those of one parameter put together."""
    return [
        Piece(parts[0].name, parts[0].start, parts[-1].stop, sum(p.numel for p in parts))
        for parts in by_parameter(pieces)
    ]


def by_parameter(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """Blocks in order, those of one parameter in a list."""
    return [list(run) for _, run in groupby(pieces, key=lambda piece: piece.name)]


class Layout:
    """The blocks of a set of parameters and, for each of `world` ranks, the pieces it owns and the blocks in them."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], world: int, whole: bool = False) -> None:
        self.blocks = blocks(shapes, whole)
        self.owner = owners(self.blocks, world)
        owned = [
            [block for block, owner in zip(self.blocks, self.owner, strict=True) if owner == rank]
            for rank in range(world)
        ]
        self.pieces = [joined(mine) for mine in owned]
        # Of each rank: the elements of the blocks of each of its pieces.
        self.sizes = [[[block.numel for block in parts] for parts in by_parameter(mine)] for mine in owned]
