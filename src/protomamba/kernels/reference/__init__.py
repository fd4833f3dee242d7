"""The definitions: every kernel in plain PyTorch, sequential, no tricks. The native ones are tested against these.

Legend: B batch, L length, T = B * L tokens, D model width, E inner width, N state, R dt rank, K taps, V classes.

Any floating dtype: float64 is computed in float64, everything narrower in float32. Results have the dtype of the first
argument unless a docstring says otherwise; recurrent states have the dtype of the computation.
"""

from __future__ import annotations

from protomamba.kernels.reference.answers import Judging, LogitProjection, decode_step, judge_block, mamba_step, product
from protomamba.kernels.reference.block import (
    BlockOutput,
    BlockState,
    BlockWeights,
    add_rms_norm,
    causal_conv,
    mamba_block,
    rms_norm,
    selective_scan,
)
from protomamba.kernels.reference.losses import (
    Sample,
    grouped_prototype_loss,
    prototype_loss,
    sampled_cross_entropy,
    sampled_softmax_loss,
    separated_prototype_loss,
    softmax_loss,
    unit,
)
from protomamba.kernels.reference.numbers import compute_dtype, matmul_dtype
from protomamba.kernels.reference.proposals import DrawnClasses, draw_classes
from protomamba.kernels.reference.updates import ADAMW_BLOCK, AdamWTensors, adamw, keep_lengths, square_sums

__all__ = [
    "ADAMW_BLOCK",
    "AdamWTensors",
    "BlockOutput",
    "BlockState",
    "BlockWeights",
    "DrawnClasses",
    "Judging",
    "LogitProjection",
    "Sample",
    "adamw",
    "add_rms_norm",
    "causal_conv",
    "compute_dtype",
    "decode_step",
    "draw_classes",
    "grouped_prototype_loss",
    "judge_block",
    "keep_lengths",
    "mamba_block",
    "mamba_step",
    "matmul_dtype",
    "product",
    "prototype_loss",
    "rms_norm",
    "sampled_cross_entropy",
    "sampled_softmax_loss",
    "selective_scan",
    "separated_prototype_loss",
    "softmax_loss",
    "square_sums",
    "unit",
]
