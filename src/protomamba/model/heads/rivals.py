"""For each class the one that it is taken for most easily: the nearest other row of the table, as far as is known.

Looking through all pairs costs O(V^2 D). So it is done now and then, for some classes and among some: what was found
stays until something nearer is.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Draws of samples from one search to the next, and the multiplications that one may take.
EVERY = 64
WORK = 4_294_967_296
# Classes that a search looks among at most.
AMONG = 16_384


def probes(search: int, common_U: Tensor, classes: int, width: int) -> tuple[Tensor, range]:
    """Which classes the search of that number (from 0) is for, and which it looks among.

    Half of them of the batch's (`common_U`), from another place each time; half in turn; and the others in turn. A
    function of its arguments alone.
    """
    among = min(classes, AMONG)
    half = max(1, WORK // (2 * among * width))
    start = search * AMONG % classes if classes > AMONG else 0
    own_U = common_U.roll(-search * half)[:half]
    turn_H = (torch.arange(min(half, classes)) + search * half) % classes
    return torch.unique(torch.cat([own_U, turn_H])), range(start, min(start + among, classes))


@torch.no_grad()
def nearest(table_VD: Tensor, probe_P: Tensor, among: range, rival_P: Tensor) -> Tensor:
    """(P,): of each probe's present rival (itself where it has none) and the classes `among` that of the largest cosine
    to it."""
    block = table_VD.shape[1]  # so that no block of cosines is larger than the rows
    others_CD = F.normalize(table_VD[among.start : among.stop].float(), dim=-1)
    return torch.cat(
        [
            _better(table_VD, probe_B, others_CD, among.start, rival_B)
            for probe_B, rival_B in zip(torch.split(probe_P, block), torch.split(rival_P, block), strict=True)
        ]
    )


def _better(table_VD: Tensor, probe_B: Tensor, others_CD: Tensor, start: int, rival_B: Tensor) -> Tensor:
    rows_BD, present_BD = (F.normalize(table_VD.index_select(0, each).float(), dim=-1) for each in (probe_B, rival_B))
    present_B = (rows_BD * present_BD).sum(-1).masked_fill(rival_B == probe_B, -torch.inf)
    cosine_BC = rows_BD @ others_CD.t()
    inside_K = ((probe_B >= start) & (probe_B < start + len(others_CD))).nonzero()[:, 0]
    cosine_BC[inside_K, probe_B[inside_K] - start] = -torch.inf
    best_B, place_B = cosine_BC.max(-1)
    return torch.where(best_B > present_B, place_B + start, rival_B)
