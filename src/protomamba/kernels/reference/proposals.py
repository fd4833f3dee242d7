"""Which classes a group of tokens is held against, drawn in proportion to what they are expected to add to its sums."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Of the weights by which classes are drawn, what is shared out evenly: so that no class that turns out to be likely
# counts for very much.
EVEN = 0.05
# What a sample's expected size is short of its limit, so that rounding never makes it larger.
SLACK = 1e-3
MOST_ROUNDS = 100
TINY = 1e-300  # a share of nothing, where all classes are certain


class DrawnClasses(NamedTuple):
    """Places of classes, rising, and the log of the chance that each had, float64."""

    places_S: Tensor
    log_chance_S: Tensor


def draw_classes(
    logits_GKC: Tensor, size_GK: Tensor, own: Sequence[Tensor], limit_G: Sequence[int], start_G: Tensor
) -> list[DrawnClasses]:
    """For each of G groups of tokens at most `limit` of C classes, each drawn with a chance that is known.

    The chances go by the root of the sum of the squared probabilities of K rows of logits, each standing for so many
    tokens. own: of each group the places of classes that are certain, if they leave half the room. start_G: float64,
    drawn evenly from [0, 1): the rest is a function of it.
    """
    own_GC = torch.zeros(logits_GKC[:, 0].shape, dtype=torch.bool)
    for own_C, places_K in zip(own_GC, own, strict=True):
        own_C[places_K] = True
    chance_GC = chances(weights(logits_GKC, size_GK), own_GC, torch.tensor(limit_G))
    found = zip(drawn(chance_GC, start_G), chance_GC, strict=True)
    return [DrawnClasses(place_S, chance_C[place_S].log()) for place_S, chance_C in found]


def weights(logits_GKC: Tensor, size_GK: Tensor) -> Tensor:
    """(G, C) float64, each group's summing to 1: the root of the sum of squared probabilities; even where they are no
    numbers or there is no token."""
    squares_GC = (size_GK[:, None] @ torch.softmax(logits_GKC, -1).square_())[:, 0]
    weight_GC = squares_GC.double().sqrt_()
    total_G1 = weight_GC.sum(1, keepdim=True)
    found_G1 = (total_G1 > 0) & total_G1.isfinite()
    return torch.where(found_G1, weight_GC / total_G1, 1 / weight_GC.shape[1])


def chances(weight_GC: Tensor, own_GC: Tensor, limit_G: Tensor) -> Tensor:
    """(G, C) float64: 1 for a group's own classes (bool), if they leave half the room; min(1, c w) for others, with an
    even share in w, and c such that all sum to the group's limit, less SLACK; all 1 where that is not below C."""
    classes, limit_G1 = weight_GC.shape[1], limit_G[:, None]
    goal_G1 = limit_G1.double() - SLACK
    own_GC = own_GC & (own_GC.sum(1, keepdim=True) <= limit_G1 // 2)
    own_GC = own_GC | (limit_G1 >= classes)
    base_GC = weight_GC * (1 - EVEN) + EVEN / classes
    factor_G1 = torch.zeros_like(base_GC[:, :1])
    for _ in range(MOST_ROUNDS):  # classes that c makes certain leave the others more: it only grows
        certain_GC = (base_GC * factor_G1 >= 1) | own_GC
        left_G1 = (1 - torch.where(certain_GC, base_GC, 0.0).sum(1, keepdim=True)).clamp_min(TINY)
        grown_G1 = (goal_G1 - certain_GC.sum(1, keepdim=True, dtype=torch.float64)) / left_G1
        if torch.equal(grown_G1, factor_G1):
            break
        factor_G1 = grown_G1
    return torch.where(certain_GC, 1.0, base_GC * factor_G1)


def drawn(chance_GC: Tensor, start_G: Tensor) -> list[Tensor]:
    """Of each group, rising, places drawn each with its chance, as many as these sum to, rounded up or down: from a
    start drawn evenly from [0, 1) (systematic sampling, Madow 1949)."""
    reached_GC = F.pad((chance_GC.cumsum(1) + start_G[:, None]).floor_(), (1, 0))
    return [places_C.nonzero()[:, 0] for places_C in reached_GC.diff(dim=1) > 0]
