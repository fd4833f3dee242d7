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
# Classes for each token of a group, where that is less than a whole sample: see `room`.
FOR_EACH_TOKEN = 64


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


def room(tokens: int, limit: int) -> int:
    """How many of at most `limit` classes a group of so many tokens is held against: half at least.

    A few tokens say little of so many classes, and what prototypes move by it is noise (docs/decisions/095).
    """
    return max(1, limit // 2, min(limit, FOR_EACH_TOKEN * tokens))
