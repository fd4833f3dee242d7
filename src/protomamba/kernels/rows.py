"""Rows of a large table, whose gradient is those rows and nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protomamba.kernels.first_order import once_differentiable


def gather_rows(table_VD: Tensor, rows_R: Tensor) -> Tensor:
    """(R, D): the rows of a table (V, D). The gradient of the table is sparse: `rows_R` and their gradients, O(R D).

    rows_R: int64, different and in rising order, so that the sparse gradient needs no sorting and no sum; `unique_rows`
    makes such. A dense gradient of a table of a million rows is a gigabyte to write, read, clip and apply at each step.
    """
    rows: Tensor = _GatherRows.apply(table_VD, rows_R)  # type: ignore[no-untyped-call]
    return rows


def unique_rows(ids: Tensor) -> tuple[Tensor, Tensor]:
    """The different ids in rising order (R,), and the place of each id among them, shaped as `ids`."""
    rows_R, places = torch.unique(ids, return_inverse=True)
    return rows_R, places


def row_gradient(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Rows (R,), rising, and gradients (R, D) of a sparse gradient; those of several passes are added in order."""
    merged = gradient.coalesce()
    return merged.indices()[0], merged.values()


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table_VD: Tensor, rows_R: Tensor) -> Tensor:
        ctx.save_for_backward(rows_R)
        ctx.shape = table_VD.shape
        return table_VD.index_select(0, rows_R)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_RD: Tensor) -> tuple[Tensor, None]:
        (rows_R,) = ctx.saved_tensors
        sparse = torch.sparse_coo_tensor(
            rows_R[None], gradient_RD, ctx.shape, is_coalesced=True, check_invariants=False
        )
        return sparse, None
