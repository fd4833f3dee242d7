"""Public ops of the kernels. Pure functions on tensors; each has its definition under the same name in `reference`."""

from __future__ import annotations

from protomamba.kernels import reference
from protomamba.kernels.reference import (
    BlockOutput,
    BlockState,
    BlockWeights,
    add_rms_norm,
    causal_conv,
    mamba_block,
    mamba_step,
    prototype_loss,
    rms_norm,
    selective_scan,
    softmax_loss,
)

__all__ = [
    "BlockOutput",
    "BlockState",
    "BlockWeights",
    "add_rms_norm",
    "causal_conv",
    "mamba_block",
    "mamba_step",
    "prototype_loss",
    "reference",
    "rms_norm",
    "selective_scan",
    "softmax_loss",
]
