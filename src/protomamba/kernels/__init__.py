"""Public ops of the kernels: pure functions on tensors. Each has its definition under the same name in `reference`."""

from __future__ import annotations

import torch

from protomamba.kernels import matmul, native, reference
from protomamba.kernels.adamw import adamw
from protomamba.kernels.allocator import keep_freed_memory
from protomamba.kernels.conv import causal_conv
from protomamba.kernels.draw_classes import draw_classes
from protomamba.kernels.judge_block import judge_block
from protomamba.kernels.keep_lengths import keep_lengths
from protomamba.kernels.mamba_block import mamba_block
from protomamba.kernels.mamba_step import DecodeStepper, MambaStepper, mamba_step
from protomamba.kernels.matmul import product
from protomamba.kernels.native import available, get_kernels, set_kernels
from protomamba.kernels.norm import add_rms_norm, rms_norm
from protomamba.kernels.prototype_loss import prototype_loss
from protomamba.kernels.reference import (
    AdamWTensors,
    BlockOutput,
    BlockState,
    BlockWeights,
    DrawnClasses,
    Judging,
    LogitProjection,
    Sample,
)
from protomamba.kernels.sampled_softmax_loss import sampled_softmax_loss
from protomamba.kernels.scan import selective_scan
from protomamba.kernels.separated_prototype_loss import grouped_prototype_loss, separated_prototype_loss
from protomamba.kernels.softmax_loss import softmax_loss
from protomamba.kernels.square_sums import square_sums

__all__ = [
    "AdamWTensors",
    "BlockOutput",
    "BlockState",
    "BlockWeights",
    "DecodeStepper",
    "DrawnClasses",
    "Judging",
    "LogitProjection",
    "MambaStepper",
    "Sample",
    "adamw",
    "add_rms_norm",
    "available",
    "causal_conv",
    "describe",
    "draw_classes",
    "get_kernels",
    "grouped_prototype_loss",
    "judge_block",
    "keep_freed_memory",
    "keep_lengths",
    "mamba_block",
    "mamba_step",
    "product",
    "prototype_loss",
    "reference",
    "rms_norm",
    "sampled_softmax_loss",
    "selective_scan",
    "separated_prototype_loss",
    "set_kernels",
    "softmax_loss",
    "square_sums",
]


def describe() -> dict[str, str]:
    """The path the ops take, for a run's header: kernels, cpu_level, matmul (float32 products), threads, torch."""
    library = native.select("describe", native.floats(0))
    found, why = native.available()
    path = "native" if library else "reference" if found else f"reference ({why})"
    return {
        "kernels": path,
        "cpu_level": library.level if library else "none",
        "matmul": matmul.backend() if library else "torch",
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
    }
