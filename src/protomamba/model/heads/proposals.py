"""Which classes a group of tokens is held against: those that it takes for likely, told by a few centroids of features.

A sum over all classes is estimated best from classes drawn in proportion to what they add to it: here to the root of
the sum, over the group's tokens, of their squared probabilities. That is the product of all tokens with all classes.
But tokens whose features are near to each other have likely classes in common, and the mean of some features, being
shorter than they are, has probabilities that are more even, as theirs are together. So a few means stand for all
tokens (docs/decisions/094).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Means of a group's features. Each is a row of a product with all candidates.
CENTROIDS = 8
# Of the weights by which classes are drawn, what is shared out evenly: so that no class that turns out to be likely
# counts for very much.
EVEN = 0.05
# Classes for each token of a group, where that is less than a whole sample: see `room`.
FOR_EACH_TOKEN = 64
# What a sample's expected size is short of its limit, so that rounding never makes it larger.
SLACK = 1e-3
MOST_ROUNDS = 100
TINY = 1e-300  # a share of nothing, where all classes are certain


def centroids(features_TD: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """(K, D), (K,): CENTROIDS means, of the features nearest to each of as many tokens by lot, and how many tokens each
    stands for; where there are no more tokens, these themselves, and zeros."""
    tokens = len(features_TD)
    if tokens <= CENTROIDS:
        missing = CENTROIDS - tokens
        return F.pad(features_TD, (0, 0, 0, missing)), F.pad(features_TD.new_ones(tokens), (0, missing))
    first_KD = features_TD[torch.randperm(tokens, generator=generator)[:CENTROIDS]]
    # The square of the distance is |f|^2 + |c|^2 - 2 f.c.
    nearest_T = (features_TD @ first_KD.t() - first_KD.square().sum(1) / 2).argmax(1)
    member_KT = (torch.arange(CENTROIDS)[:, None] == nearest_T).to(features_TD.dtype)
    tokens_K = member_KT.sum(1)
    return (member_KT @ features_TD) / tokens_K.clamp_min(1)[:, None], tokens_K


def weights(logits_GKC: Tensor, tokens_GK: Tensor) -> Tensor:
    """(G, C) float64, each group's summing to 1: the root of the sum of squared probabilities; even where they are no
    numbers or there is no token."""
    squares_GC = (tokens_GK[:, None] @ torch.softmax(logits_GKC, -1).square_())[:, 0]
    weight_GC = squares_GC.double().sqrt_()
    total_G1 = weight_GC.sum(1, keepdim=True)
    found_G1 = (total_G1 > 0) & total_G1.isfinite()
    return torch.where(found_G1, weight_GC / total_G1, 1 / weight_GC.shape[1])


def room(tokens: int, limit: int) -> int:
    """How many of at most `limit` classes a group of so many tokens is held against: half at least.

    A few tokens say little of so many classes, and what prototypes move by it is noise (docs/decisions/095).
    """
    return max(1, limit // 2, min(limit, FOR_EACH_TOKEN * tokens))


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
