"""draw_classes: the classes that groups of tokens are held against, from a few logits of each."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.reference import DrawnClasses
from protomamba.kernels.reference.proposals import EVEN, SLACK


@torch.no_grad()
def draw_classes(
    logits_GKC: Tensor, size_GK: Tensor, own: Sequence[Tensor], limit_G: Sequence[int], start_G: Tensor
) -> list[DrawnClasses]:
    """At most so many of C classes for each group: see `reference.draw_classes`, which this equals but for rounding.

    Native for float32 logits. ValueError for shapes that do not fit and for a place of `own` that is none.
    """
    sizes = check_shapes("draw_classes", logits_GKC=logits_GKC, size_GK=size_GK, start_G=start_G)
    groups, rows, classes = (sizes[letter] for letter in "GKC")
    if not groups == len(own) == len(limit_G):
        raise ValueError(f"draw_classes: own, limit_G: expected {groups}, got {len(own)} and {len(limit_G)}")
    places_O = torch.cat([torch.empty(0, dtype=torch.int64), *own])
    if len(places_O) and not 0 <= int(places_O.min()) <= int(places_O.max()) < classes:
        raise ValueError(f"draw_classes: own: expected places from 0 to {classes - 1}")
    library = native.select("draw_classes", logits_GKC, (torch.float32,))
    if library is None:
        return reference.draw_classes(logits_GKC, size_GK, own, limit_G, start_G)
    most = min(classes, max(limit_G, default=0))
    whole = torch.tensor([*limit_G, *(len(each) for each in own)], dtype=torch.int64).view(2, groups)
    places, counts = torch.empty(groups, most, dtype=torch.int64), torch.empty(groups, dtype=torch.int64)
    log_chance = torch.empty(groups, most, dtype=torch.float64)
    library.draw_classes(
        G=groups, K=rows, C=classes, most=most, even=EVEN, slack=SLACK,
        logits=logits_GKC.clone(memory_format=torch.contiguous_format), tokens=size_GK.float().contiguous(),
        own=places_O, own_end=whole[1].cumsum(0), limit=whole[0], start=start_G.double().contiguous(),
        places=places, count=counts, log_chance=log_chance,
    )  # fmt: skip
    return [DrawnClasses(places[g, :n], log_chance[g, :n]) for g, n in enumerate(counts.tolist())]
