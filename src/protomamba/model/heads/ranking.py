"""Ranks of the right class among all classes, and the figures that recommenders are judged by.

A rank is 1 for the best score. Of equal scores the right class gets the worst place, and NaN counts as better than any:
a model that has collapsed, whose scores are all the same, ranks last instead of first. Figures over sampled negatives
order models differently from those over all items (Krichene and Rendle 2020), so all classes are ranked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from protomamba.kernels import Judging, judge_block
from protomamba.model.heads.base import Head, valid_positions
from protomamba.model.heads.many import MANY, class_blocks

CUTS = (1, 5, 10)


def ranks(scores_TV: Tensor, targets_T: Tensor, reserved: Sequence[int] = ()) -> Tensor:
    """int64 (T,): 1 + how many classes score at least as high as the target; classes in `reserved` are left out."""
    own_T1 = scores_TV.gather(1, targets_T[:, None])
    at_least_TV = ~(scores_TV < own_T1)
    at_least_TV.scatter_(1, targets_T[:, None], True)  # a NaN of its own as well
    if len(reserved):
        at_least_TV[:, list(reserved)] = False
    return at_least_TV.sum(1)


@torch.no_grad()
def ranks_of_targets(head: Head, z_BLD: Tensor, targets_BL: Tensor, reserved: Sequence[int] = ()) -> Tensor:
    """`ranks` of the targets >= 0, in order, by the head's scores. In blocks: B L V is never kept."""
    z_TD, targets_T = valid_positions(z_BLD, targets_BL)
    if head.classes >= MANY and len(z_TD) and head.class_scores(z_TD[:1], 0, 1) is not None:
        return _ranks_by_classes(head, z_TD, targets_T, reserved)
    blocks = zip(head.blocks(z_TD), head.blocks(targets_T), strict=True)
    found = [ranks(head.scores(z_RD), targets_R, reserved) for z_RD, targets_R in blocks]
    return torch.cat(found) if found else targets_T


def _ranks_by_classes(head: Head, z_TD: Tensor, targets_T: Tensor, reserved: Sequence[int]) -> Tensor:
    """`ranks` over very many classes, in two passes: each target's own score, then those not below it.

    Both passes take a score from the same product, so that a class never outranks itself by rounding.
    """
    own_T, wanted = _own_scores(head, z_TD, targets_T), torch.tensor(sorted(set(reserved)), dtype=torch.int64)
    judging = Judging(rank_T=torch.empty(len(z_TD), dtype=torch.int64))
    left_out = wanted if len(wanted) else None
    for start, stop in class_blocks(len(z_TD), head.classes):
        scores_TC = cast(Tensor, head.class_scores(z_TD, start, stop))
        judge_block(scores_TC, start, judging, own_T=own_T, targets_T=targets_T, reserved_R=left_out)
    return cast(Tensor, judging.rank_T)


def _own_scores(head: Head, z_TD: Tensor, targets_T: Tensor) -> Tensor:
    """(T,): each target's own score, from the products that the others come from."""
    own_T: Tensor | None = None
    for start, stop in class_blocks(len(z_TD), head.classes):
        inside_T = (targets_T >= start) & (targets_T < stop)
        scores_TC = cast(Tensor, head.class_scores(z_TD, start, stop))
        own_T = scores_TC.new_full((len(z_TD),), float("nan")) if own_T is None else own_T
        own_T[inside_T] = scores_TC[inside_T, targets_T[inside_T] - start]
    return cast(Tensor, own_T)


def ranking_figures(ranks_T: Tensor, cuts: Sequence[int] = CUTS) -> dict[str, float]:
    """hit@k, ndcg@k (one right class each: 1 / log2(1 + rank)) and mrr, means over all targets; empty without any."""
    if not len(ranks_T):
        return {}
    ranks_T = ranks_T.double()
    gain_T = 1 / torch.log2(1 + ranks_T)
    figures = {}
    for k in cuts:
        within_T = (ranks_T <= k).double()
        figures[f"hit@{k}"] = float(within_T.mean())
        figures[f"ndcg@{k}"] = float((gain_T * within_T).mean())
    return {**figures, "mrr": float((1 / ranks_T).mean())}
