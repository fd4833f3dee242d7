"""Which classes a training step compares z with where there are too many for all of them: a sampled softmax's sample.

The classes of the batch themselves, which are the likely ones, and even ones to keep the rest honest. How a class's
chance to be among them enters the loss: `kernels.reference.sampled_cross_entropy`. Nothing here is of size V.
"""

from __future__ import annotations

import math
from typing import NamedTuple

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


class Drawing(NamedTuple):
    """How a step's samples are drawn: beside how many targets, which share of their classes is kept, how many even
    draws from how many classes there are, and how many samples: each has the batch's classes and even ones of its own.
    """

    targets: int
    kept: float
    even: int
    classes: int
    groups: int = 1


def log_chances(share_S: Tensor, drawing: Drawing) -> Tensor:
    """(S,) float64: the log of each class's chance to be in a sample, 1 - (1 - r (1 - (1 - f)^T)) (1 - 1/V)^E.

    share_S: f, how often the class comes; T targets; r, the share of the batch's classes that was kept; E even draws.
    """
    log_missed_S = torch.log1p(-_in_batch(share_S, drawing)) + drawing.even * math.log1p(-1 / drawing.classes)
    return torch.log(-torch.expm1(log_missed_S))


def _in_batch(share_S: Tensor, drawing: Drawing) -> Tensor:
    """(S,) float64: r (1 - (1 - f)^T), the chance of a class to be in all samples of a step, below 1."""
    come_S = -torch.expm1(drawing.targets * torch.log1p(-share_S.double().clamp_max(1 - 1e-12)))
    return (drawing.kept * come_S).clamp_max(1 - 1e-12)


def steadiness(share_S: Tensor, drawing: Drawing) -> Tensor:
    """(S,) float64, at most 1: a class's mean gradient over its root mean square, from being sampled alone.

    It counts 1 / q in each of the G samples that have it: all with chance b, else each with chance e, so

        q = b + (1 - b) e        steadiness = q / sqrt(b + (1 - b) (e^2 + e (1 - e) / G))        (G = 1: sqrt(q))

    Adam divides by the root mean square: the steps of a class are that much shorter than if it were always seen.
    """
    b_S, e = _in_batch(share_S, drawing), -math.expm1(drawing.even * math.log1p(-1 / drawing.classes))
    seldom = e * e + e * (1 - e) / drawing.groups
    return (b_S + (1 - b_S) * e) / (b_S + (1 - b_S) * seldom).sqrt()


def key_of_group(key: int, group: int) -> int:
    """The key of a step's `group`-th sample, from 0 to 2^63 - 1: the step's own for the first."""
    return (key + group * 0x9E3779B97F4A7C15) & (2**63 - 1)
