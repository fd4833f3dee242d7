"""square_sums: the norms of many tensors, and whether all of them are finite, in one pass over their memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from protomamba.kernels import native, reference


def square_sums(tensors: Sequence[Tensor], parts: Sequence[Sequence[int]] | None = None) -> list[float]:
    """The sum of the squares of each tensor, in float64: see `reference.square_sums`, which this equals.

    parts: by tensor, of how many of its elements each there is to be a sum of its own, in memory order; None: of all.
    Not finite exactly where a NaN or an infinity is. The same bits for any number of threads. Native where all tensors
    are contiguous float32. ValueError for parts that are not those of the tensors.
    """
    if parts is None:
        parts = [[x.numel()] for x in tensors]
    elif [sum(sizes) for sizes in parts] != [x.numel() for x in tensors]:
        raise ValueError("square_sums: parts: expected those of each tensor to have all of its elements")
    library = native.select("square_sums", tensors[0], (torch.float32,)) if tensors else None
    if library is None or not all(x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in tensors):
        return reference.square_sums(tensors, parts)
    sizes, addresses = torch.tensor(list(_places(tensors, parts)), dtype=torch.int64).view(-1, 2).t().contiguous()
    sums = torch.empty(len(sizes), dtype=torch.float64)
    library.square_sums(count=len(sizes), sizes=sizes, data=addresses, sums=sums)
    found: list[float] = sums.tolist()
    return found


def _places(tensors: Sequence[Tensor], parts: Sequence[Sequence[int]]) -> Iterator[tuple[int, int]]:
    """The elements of each part of contiguous float32 tensors, and its address."""
    for x, sizes in zip(tensors, parts, strict=True):
        address = x.data_ptr()
        for size in sizes:
            yield size, address
            address += 4 * size
