"""Predictions over very many classes: one pass over the table in blocks of classes, with running figures.

Memory is O(targets x block), whatever the number of classes. The table is read once for all targets together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from protomamba.kernels import Judging, judge_block

# Scores held at once: 16 MiB of float32.
BLOCK_SCORES = 4_194_304
# From this number of classes on, what need not be exact is judged on a part of the targets.
MANY = 65_536
# Classes of a block at most: their rows are read from memory once and stay in the cache for what is done with them.
BLOCK_CLASSES = 8_192
# Scores that judging a part may take, a validation.
JUDGED_SCORES = 134_217_728

ClassScores = Callable[[int, int], Tensor]  # (T, stop - start) scores of the classes from start to stop


@dataclass(frozen=True)
class Judged:
    """For T targets: the k best scores, falling, with their classes, (T, k); and log sum exp(factor score), (T,)."""

    values_Tk: Tensor
    classes_Tk: Tensor
    log_sum_T: Tensor


def judge(scores: ClassScores, targets: int, classes: int, k: int = 1, factor: float = 1.0) -> Judged:
    """One pass over all classes. Of equal scores the class with the lower number comes first, and NaN before all."""
    judging: Judging | None = None
    for start, stop in class_blocks(targets, classes):
        scores_TC = scores(start, stop)
        if judging is None:
            judging = Judging.empty(targets, min(k, classes), scores_TC.dtype)._replace(rank_T=None)
        judge_block(scores_TC, start, judging, factor=factor)
    assert judging is not None and judging.values_TK is not None, "there is no class"
    assert judging.classes_TK is not None and judging.log_sum_T is not None
    return Judged(judging.values_TK, judging.classes_TK, judging.log_sum_T.to(judging.values_TK.dtype))


def class_blocks(targets: int, classes: int) -> Iterator[tuple[int, int]]:
    """Start and stop of the blocks of classes whose scores for all targets may be held at once."""
    size = max(1, min(BLOCK_CLASSES, BLOCK_SCORES // max(1, targets)))
    for start in range(0, classes, size):
        yield start, min(start + size, classes)


def judged_part(targets: int, classes: int) -> Tensor:
    """Which targets (evenly spread, at least one) are judged where not all need be: all up to `MANY` classes."""
    wanted = targets if classes < MANY else min(targets, max(1, JUDGED_SCORES // classes))
    return torch.arange(wanted) * targets // max(1, wanted)
