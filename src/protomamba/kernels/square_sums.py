"""square_sums: the norms of many tensors, and whether all of them are finite, in one pass over their memory."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protomamba.kernels import native, reference


def square_sums(tensors: Sequence[Tensor]) -> list[float]:
    """The sum of the squares of each tensor, in float64: see `reference.square_sums`, which this equals.

    Not finite exactly where the tensor holds a NaN or an infinity. The same bits for any number of threads. Native
    where all tensors are contiguous float32.
    """
    library = native.select("square_sums", tensors[0], (torch.float32,)) if tensors else None
    if library is None or not all(x.dtype == torch.float32 and x.is_cpu and x.is_contiguous() for x in tensors):
        return reference.square_sums(tensors)
    sizes = torch.tensor([x.numel() for x in tensors])
    addresses = torch.tensor([x.data_ptr() for x in tensors])
    sums = torch.empty(len(tensors), dtype=torch.float64)
    library.square_sums(count=len(tensors), sizes=sizes, data=addresses, sums=sums)
    found: list[float] = sums.tolist()
    return found
