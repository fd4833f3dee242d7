"""One measure of how close two results are, and how close a kernel has to come to its float64 twin."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

# RMS of the error over RMS of the float64 result. Loosening an entry needs a written reason.
TOLERANCES = {
    ("forward", torch.float64): 1e-12,
    ("gradient", torch.float64): 1e-11,
    ("forward", torch.float32): 2e-6,
    ("gradient", torch.float32): 2e-5,
    # One rounding to 8 bits of mantissa is at most 2^-8 = 4e-3 of an element, and some tensors have only one.
    ("forward", torch.bfloat16): 4e-3,
    ("gradient", torch.bfloat16): 4e-3,
    # One token of a block of random weights is five ops in a row on a few dozen numbers, some of which nearly cancel.
    ("step", torch.float32): 1e-5,
    # Beside int8 weights a vector is rounded to 16-bit integers: 1.5e-5 of its largest number at most,
    # ten times in a row in the three layers and the head of a decoder's test.
    ("int8", torch.float32): 5e-5,
    ("int8 step", torch.float32): 1e-3,
    # A block that keeps its activations in bfloat16: each is off by 2^-9 at most, and a gradient sees several of them.
    ("kept in bf16", torch.float32): 1e-2,
    # A block rounds its activations to bfloat16 at every seam, in both directions.
    ("block gradient", torch.bfloat16): 3e-2,
}

# The ratio says nothing of a sum that cancels. At B1-L1-E33-N1 the gradient of C is one number, 2.6e-4 out of terms
# whose sizes add up to 1.1: the kernel is off by 2e-8 of the terms, yet by 2.3e-5 of the number (the twin in float32 by
# 2.0e-5). The inputs of `cases` are of size 1, so below this the error itself is held, at 2e-7 for a gradient.
SMALLEST = 1e-2


def rms_ratio(found: Any, expected: Any, smallest: float = 0.0) -> float:
    """RMS(found - expected) / RMS(expected), the latter at least `smallest`, in float64; 0/0 is 0, x/0 is infinite.

    A whole tensor (or anything that numpy takes for one) against its own size: single elements near zero do not blow it
    up, a wrong tensor cannot hide in it. ValueError for two shapes.
    """
    found64, expected64 = _double(found), _double(expected)
    if found64.shape != expected64.shape:
        raise ValueError(f"cannot compare shapes {tuple(found64.shape)} and {tuple(expected64.shape)}")
    if found64.numel() == 0:
        return 0.0
    error, size = (float(x.square().mean().sqrt()) for x in (found64 - expected64, expected64))
    size = max(size, smallest)
    if size == 0.0:
        return math.inf if error > 0.0 else error
    return error / size


def _double(x: Any) -> Tensor:
    if isinstance(x, Tensor):
        return x.detach().double()
    import numpy as np

    return torch.from_numpy(np.array(x, dtype=np.float64))
