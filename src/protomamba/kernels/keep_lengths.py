"""keep_lengths: rows of a table back to their lengths, in one pass over its memory."""

from __future__ import annotations

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes


@torch.no_grad()
def keep_lengths(x_VD: Tensor, length: float, lengths_V: Tensor | None = None, rows_R: Tensor | None = None) -> None:
    """Gives rows of x their lengths in place: see `reference.keep_lengths`, which this equals.

    Native for contiguous float32 x. ValueError for shapes that do not fit.
    """
    sizes = check_shapes("keep_lengths", x_VD=x_VD)
    rows = sizes["V"] if rows_R is None else len(rows_R)
    if lengths_V is not None and lengths_V.shape != (rows,):
        raise ValueError(f"keep_lengths: lengths_V: expected ({rows},), got {tuple(lengths_V.shape)}")
    library = native.select("keep_lengths", x_VD, (torch.float32,))
    if library is None or not x_VD.is_contiguous():
        return reference.keep_lengths(x_VD, length, lengths_V, rows_R)
    lengths = None if lengths_V is None else lengths_V.float().contiguous()
    index = None if rows_R is None else rows_R.long().contiguous()
    library.keep_lengths(T=rows, D=sizes["D"], length=length, lengths=lengths, index=index, x=x_VD)
    torch.autograd.graph.increment_version(x_VD)
    return None
