"""What follows the gradients: their squares, and the update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protomamba.kernels.reference.numbers import compute_dtype


def square_sums(tensors: Sequence[Tensor], parts: Sequence[Sequence[int]] | None = None) -> list[float]:
    """The sum of the squares of each tensor's elements, or of each of its parts of so many elements, in float64: not
    finite exactly where one of them is not."""
    flat = [x.detach().reshape(-1) for x in tensors]
    if parts is not None:
        flat = [piece for x, sizes in zip(flat, parts, strict=True) for piece in torch.split(x, list(sizes))]
    return [float(x.double().square().sum()) for x in flat]


@torch.no_grad()
def keep_lengths(x_VD: Tensor, length: float, lengths_V: Tensor | None = None, rows_R: Tensor | None = None) -> None:
    """Gives each row of x, in place, the length `length`, times its own of `lengths_V` if given; zeros stay zeros.

    rows_R: different rows; the others stay as they are, and `lengths_V` is theirs.
    """
    rows = x_VD if rows_R is None else x_VD.index_select(0, rows_R)
    to = length if lengths_V is None else (length * lengths_V)[:, None]
    kept = F.normalize(rows.to(compute_dtype(x_VD)), dim=-1) * to
    if rows_R is None:
        x_VD.copy_(kept)
    else:
        x_VD.index_copy_(0, rows_R, kept.to(x_VD.dtype))


class AdamWTensors(NamedTuple):
    """A parameter's update: its gradient, moments and number of updates so far (a float32 scalar), its weight decay."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    decay: float


# Neighbours, in memory order, that `adamw` updates together or, where one's moments would not be finite, not at all.
ADAMW_BLOCK = 256


@torch.no_grad()
def adamw(
    updates: Sequence[AdamWTensors], *, lr: float, scale: float, beta1: float, beta2: float, eps: float
) -> list[bool]:
    """One update of each tensor in place (arXiv 1711.05101, algorithm 2; g counts `scale` times):

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        t = t + 1
        p = (1 - lr decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Returns for which tensors m or v would not have been finite somewhere: the block around that stays as it is.
    """
    return [_adamw(u, lr, scale, beta1, beta2, eps) for u in updates]


def _adamw(u: AdamWTensors, lr: float, scale: float, beta1: float, beta2: float, eps: float) -> bool:
    dtype = compute_dtype(u.parameter)
    p, g, m, v = (x.to(dtype) for x in u[:4])
    t = float(u.step) + 1.0
    m = beta1 * m + (1 - beta1) * scale * g
    v = beta2 * v + (1 - beta2) * (scale * g).square()
    p = (1 - lr * u.decay) * p - lr / (1 - beta1**t) * m / ((v / (1 - beta2**t)).sqrt() + eps)
    finite = torch.cat([b.all().expand(len(b)) for b in torch.split((m + v).isfinite().flatten(), ADAMW_BLOCK)])
    for old, new in zip((u.parameter, u.exp_avg, u.exp_avg_sq), (p, m, v), strict=True):
        old.copy_(torch.where(finite.view(old.shape), new, old.to(dtype)))
    u.step.add_(1)
    return not bool(finite.all())
