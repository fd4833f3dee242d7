"""Which classes a training step compares z with where there are too many for all of them: a sampled softmax's sample.

The classes of the batch themselves, which are the likely ones, and even ones to keep the rest honest. How a class's
chance to be among them enters the loss: `kernels.reference.sampled_cross_entropy`. Nothing here is of size V.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def even_draws(limit: int, common: int) -> int:
    """How many of at most `limit` classes are drawn evenly beside `common` ones: half, fewer where those need room."""
    return max(1, limit // 8, min(limit // 2, limit - common))


def draw(key: int, common_U: Tensor, classes: int, limit: int) -> tuple[Tensor, float]:
    """At most `limit` of the classes, in rising order, and the share of the common ones that was kept.

    common_U: the distinct classes of the batch, int64: a part of them by lot where they are too many. The rest evenly
    from all V. A function of its arguments alone.
    """
    generator = torch.Generator().manual_seed(key)
    even = even_draws(limit, len(common_U))
    room = max(1, limit - even)
    kept_K = common_U
    if len(common_U) > room:
        kept_K = common_U[torch.randperm(len(common_U), generator=generator)[:room]]
    even_E = torch.randint(classes, (even,), generator=generator)
    return torch.unique(torch.cat([kept_K, even_E])), len(kept_K) / max(1, len(common_U))


def log_chances(share_S: Tensor, targets: int, kept: float, even: int, classes: int) -> Tensor:
    """(S,) float64: the log of each class's chance to be in the sample, 1 - (1 - r (1 - (1 - f)^T)) (1 - 1/V)^E.

    share_S: f, how often the class comes; T targets; r, the share of the batch's classes that was kept; E even draws.
    """
    in_batch_S = -torch.expm1(targets * torch.log1p(-share_S.double().clamp_max(1 - 1e-12)))
    log_missed_S = torch.log1p(-(kept * in_batch_S).clamp_max(1 - 1e-12)) + even * math.log1p(-1 / classes)
    return torch.log(-torch.expm1(log_missed_S))
