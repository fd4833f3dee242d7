"""What needs no gradient: decoding, and judging scores block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protomamba.kernels.reference.block import BlockState, BlockWeights, mamba_block, rms_norm
from protomamba.kernels.reference.losses import unit


class Judging(NamedTuple):
    """What `judge_block` keeps of the blocks so far, for T targets; what is None is not looked for.

    values_TK: the K best scores, falling, NaN first. classes_TK: int64, theirs; of equal scores the lowest comes first.
    log_sum_T: float64, log sum exp(factor score). rank_T: int64, how many classes score at least as high as the target.
    """

    values_TK: Tensor | None = None
    classes_TK: Tensor | None = None
    log_sum_T: Tensor | None = None
    rank_T: Tensor | None = None

    @classmethod
    def empty(cls, targets: int, k: int, dtype: torch.dtype) -> Judging:
        """Room for all four, for scores of `dtype`."""
        values_TK, classes_TK = torch.empty(targets, k, dtype=dtype), torch.empty(targets, k, dtype=torch.int64)
        return cls(
            values_TK,
            classes_TK,
            torch.empty(targets, dtype=torch.float64),
            torch.empty(targets, dtype=torch.int64),
        )


class LogitProjection(NamedTuple):
    """How a head's logits come from z: scale * (z, or z / |z| where `unit`) . every row of matrix_VD."""

    matrix_VD: Tensor
    unit: bool
    scale: float


@torch.no_grad()
def mamba_step(x_BD: Tensor, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> Tensor:
    """One token of `mamba_block` for a batch: returns x (B, D) and updates `state` in place. No gradient."""
    out = mamba_block(x_BD[:, None], weights, eps=eps, state=state, return_state=True)
    assert out.state is not None
    state.conv_BKE.copy_(out.state.conv_BKE)
    state.ssm_BEN.copy_(out.state.ssm_BEN)
    return out.x_BLD[:, 0]


def product(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x @ w.T, (T, O): the scores of T rows for O classes; wider than both where their dtypes differ."""
    dtype = torch.promote_types(x_TI.dtype, w_OI.dtype)
    return x_TI.to(dtype) @ w_OI.to(dtype).t()


@torch.no_grad()
def judge_block(
    scores_TC: Tensor,
    start: int,
    judging: Judging,
    *,
    factor: float = 1.0,
    own_T: Tensor | None = None,
    targets_T: Tensor | None = None,
    reserved_R: Tensor | None = None,
) -> None:
    """Adds the scores of the C classes from `start` on to `judging`, in place. No gradient.

    Blocks come in rising order from class 0 on, without gaps: at `start` 0 whatever `judging` held is forgotten. Of its
    K best, the first min(K, classes so far) are written. rank_T counts by `own_T`, the target's own score: every class
    k with not (score_k < own), so NaN counts, and the target itself in any case; those in `reserved_R` never do.
    """
    values_TK, classes_TK, log_sum_T, rank_T = judging
    if values_TK is not None and classes_TK is not None:
        kept = min(start, values_TK.shape[1])
        found_TC = torch.arange(start, start + scores_TC.shape[1]).expand(scores_TC.shape)
        values, order = torch.cat([values_TK[:, :kept], scores_TC], 1).sort(dim=1, descending=True, stable=True)
        best = slice(min(values_TK.shape[1], start + scores_TC.shape[1]))
        classes = torch.cat([classes_TK[:, :kept], found_TC], 1).gather(1, order[:, best])
        values_TK[:, best], classes_TK[:, best] = values[:, best], classes
    if log_sum_T is not None:
        block_T = (factor * scores_TC).logsumexp(1).double()
        log_sum_T.copy_(torch.logaddexp(log_sum_T, block_T) if start else block_T)
    if rank_T is not None and own_T is not None and targets_T is not None:
        classes_C = torch.arange(start, start + scores_TC.shape[1])
        counted_TC = ~(scores_TC < own_T[:, None]) | (classes_C == targets_T[:, None])
        if reserved_R is not None:
            counted_TC &= ~torch.isin(classes_C, reserved_R)
        rank_T.copy_(counted_TC.sum(1) + (rank_T if start else 0))


def decode_step(
    tokens_B: Tensor,
    embedding_ID: Tensor,
    blocks: Sequence[tuple[BlockWeights, BlockState]],
    norm_D: Tensor,
    scoring: LogitProjection,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Logits (B, V) after one more token of each sequence: embedding, blocks, norm, head. Moves every block's state on
    in place. No gradient."""
    x_BD = embedding_ID[tokens_B]
    for weights, state in blocks:
        x_BD = mamba_step(x_BD, weights, state, eps=eps)
    z_BD = rms_norm(x_BD[:, None], norm_D, eps)[:, 0]
    return scoring.scale * product(unit(z_BD) if scoring.unit else z_BD, scoring.matrix_VD)
