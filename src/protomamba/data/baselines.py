"""What a model of item sequences has to beat: the commonest items, and the most common items after the last one.

Both are counted on the training part and rank all items, as the model is judged: rank 1 is the best, and of items that
are equally common the right one gets the worst place.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from protomamba.data.sequences import SequenceSet
from protomamba.data.vocabulary import RESERVED, UNKNOWN

Integers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Baselines:
    """Counts of the training part. `pairs` are `previous * size + item`, ascending, each `pair_counts` times."""

    popularity: Integers
    pairs: Integers
    pair_counts: Integers

    @classmethod
    def of(cls, training: SequenceSet) -> Baselines:
        """Count all of it: 8 bytes a transition for a moment, 16 for each different pair after it."""
        size = training.about.vocab_size
        popularity, keys = np.zeros(size, dtype=np.int64), []
        for previous, targets in training.transitions():
            known = targets != UNKNOWN
            popularity += np.bincount(targets[known], minlength=size)
            keys.append(previous[known] * size + targets[known])
        pairs, counts = np.unique(np.concatenate(keys), return_counts=True) if keys else (np.zeros(0, int),) * 2
        return cls(popularity, pairs, counts)

    @property
    def size(self) -> int:
        return len(self.popularity)

    def popularity_ranks(self, targets: Integers) -> Integers:
        """Rank of each target among all items by how common they are."""
        ascending = np.sort(self.popularity[RESERVED:])
        return len(ascending) - np.searchsorted(ascending, self.popularity[targets], side="left")

    def bigram_ranks(self, previous: Integers, targets: Integers) -> Integers:
        """Rank of each target by how often it followed `previous`, then by how common it is."""
        before, item = np.divmod(self.pairs, self.size)
        starts = np.searchsorted(before, np.arange(self.size + 1))
        # Equal (count, popularity) share a place; 0 is the best.
        popular = _dense_places(self.popularity)
        place = _dense_places(self.pair_counts * (popular.max(initial=0) + 1) + popular.max(initial=0) - popular[item])
        by_place = np.sort(before * (len(self.pairs) + 1) + place)
        by_popularity = np.sort(before * (self.size + 1) + popular[item])
        wanted = previous * self.size + targets
        at = np.minimum(np.searchsorted(self.pairs, wanted), max(len(self.pairs) - 1, 0))
        followed = self.pairs[at] == wanted if len(self.pairs) else np.zeros(len(targets), dtype=bool)
        successors = starts[previous + 1] - starts[previous]
        seen_places = place[at] if len(self.pairs) else np.zeros(len(targets), dtype=np.int64)
        upto = np.searchsorted(by_place, previous * (len(self.pairs) + 1) + seen_places, side="right")
        commoner = np.searchsorted(by_popularity, previous * (self.size + 1) + popular[targets], side="right")
        unseen = successors + self.popularity_ranks(targets) - (commoner - starts[previous])
        return np.where(followed, upto - starts[previous], unseen)

    def ranks(self, previous: Integers, targets: Integers) -> dict[str, Integers]:
        """The ranks of each baseline by its name."""
        return {"popularity": self.popularity_ranks(targets), "last_item": self.bigram_ranks(previous, targets)}


def _dense_places(values: Integers) -> Integers:
    """Place of each value among the different ones, the largest first."""
    different, inverse = np.unique(values, return_inverse=True)
    return len(different) - 1 - inverse
