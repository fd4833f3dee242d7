"""Row-sparse gradients of a step's shards, from every rank's own to their sum at all of them.

A shard's gradient of a row-sparse table is the rows that it read. It is merged with those of the same rank as far as
the tree of `comm_tree` allows, then every rank gets the nodes of all others and adds up the rest: the same bits on any
number of ranks. Tables are not cut: each rank holds the whole, with its moments, and makes the same update.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from protomamba.kernels.rows import row_gradient
from protomamba.train.comm import Comm
from protomamba.train.comm_tree import Partials, fold, nodes, share

Rows = tuple[Tensor, Tensor]  # int64 (R,), rising, and values (R, D)


def merged(one: Rows, other: Rows) -> Rows:
    """The rows of both; the values of a row that both have are added, the others stay as they are."""
    rows_R = torch.unique(torch.cat([one[0], other[0]]))
    values_RD = one[1].new_zeros(len(rows_R), one[1].shape[1])
    values_RD.index_copy_(0, torch.searchsorted(rows_R, one[0]), one[1])
    values_RD.index_add_(0, torch.searchsorted(rows_R, other[0]), other[1])
    return rows_R, values_RD


class RowSum:
    """The sum over `count` shards of the gradients of these tables; `finish` leaves it in `.grad`, on every rank."""

    def __init__(self, comm: Comm, count: int, tables: Mapping[str, nn.Parameter]) -> None:
        self.comm, self.count, self.tables = comm, count, tables
        self._partials = {name: Partials[Rows](comm.shards(count), count, merged) for name in tables}

    def take(self) -> None:
        """Take over this rank's next shard's gradients, which are in the tables' `.grad`."""
        for name, table in self.tables.items():
            gradient, table.grad = table.grad, None
            nothing = torch.empty(0, dtype=torch.int64), table.new_empty(0, table.shape[1])
            self._partials[name].push(nothing if gradient is None else row_gradient(gradient.detach()))

    def finish(self) -> None:
        """Wait for the other ranks; a table of which no shard read a row has no gradient."""
        for name, table in self.tables.items():
            rows_R, values_RD = fold(self._everywhere(self._partials[name].done), self.count, merged)
            if len(rows_R):
                table.grad = torch.sparse_coo_tensor(
                    rows_R[None], values_RD, table.shape, is_coalesced=True, check_invariants=False
                )

    def _everywhere(self, own: Mapping[tuple[int, int], Rows]) -> dict[tuple[int, int], Rows]:
        """The nodes of all ranks."""
        if self.comm.world == 1:
            return dict(own)
        found = list(own.values())
        sizes = self.comm.all_gather(torch.tensor([len(rows_R) for rows_R, _ in found]))
        # One more row than there are: a message is never empty.
        like_D = found[0][1].new_zeros(1, found[0][1].shape[1])
        rows = self.comm.all_gather(torch.cat([*(rows_R for rows_R, _ in found), torch.zeros(1, dtype=torch.int64)]))
        values = self.comm.all_gather(torch.cat([*(values_RD for _, values_RD in found), like_D]))
        everywhere: dict[tuple[int, int], Rows] = {}
        for rank in range(self.comm.world):
            named = nodes(share(self.count, self.comm.world, rank), self.count)
            cuts = [*sizes[rank].tolist(), 1]
            parts = zip(torch.split(rows[rank], cuts), torch.split(values[rank], cuts), strict=True)
            everywhere |= dict(zip(named, parts, strict=False))  # without the row that was one more
        return everywhere
