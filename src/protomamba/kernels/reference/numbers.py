"""What the definitions compute in."""

from __future__ import annotations

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


def matmul_dtype(precision: str, x: Tensor) -> torch.dtype:
    """The dtype of a block's matrix products: that of the computation for "fp32", bfloat16 for "bf16"."""
    if precision == "fp32":
        return compute_dtype(x)
    if precision == "bf16":
        return torch.bfloat16
    raise ValueError(f"precision: expected 'fp32' or 'bf16', got {precision!r}")
