"""The baselines against their definition, item by item."""

from __future__ import annotations

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data.baselines import Baselines
from protomamba.data.sequences import SequenceSet
from protomamba.data.shards import in_memory
from protomamba.data.source import DataInfo
from protomamba.data.vocabulary import BOUNDARY, UNKNOWN

SIZE = 8
items_ = st.integers(UNKNOWN, SIZE - 1)


def make(sequences: list[list[int]]) -> SequenceSet:
    stops = np.cumsum([len(s) for s in sequences])
    starts = stops - [len(s) for s in sequences]
    spans = np.stack((starts, starts, stops), axis=1)
    return SequenceSet(
        in_memory([*(token for each in sequences for token in each), 0]), spans, DataInfo(vocab_size=SIZE)
    )


def rank(scores: dict[int, tuple[int, ...]], target: int) -> int:
    return sum(score >= scores[target] for score in scores.values())


@settings(max_examples=150, deadline=None)
@given(
    sequences=st.lists(st.lists(items_, min_size=1, max_size=8), min_size=1, max_size=8),
    asked=st.lists(st.tuples(st.sampled_from([BOUNDARY, *range(1, SIZE)]), st.integers(2, SIZE - 1)), min_size=1),
)
def test_ranks_are_those_of_the_definition(sequences: list[list[int]], asked: list[tuple[int, int]]) -> None:
    popular = Counter(item for s in sequences for item in s if item != UNKNOWN)
    after = Counter((a, b) for s in sequences for a, b in zip([BOUNDARY, *s], s, strict=False) if b != UNKNOWN)
    previous, targets = (np.array(each) for each in zip(*asked, strict=True))
    found = Baselines.of(make(sequences)).ranks(previous, targets)
    by_count = {item: (popular[item],) for item in range(2, SIZE)}
    assert found["popularity"].tolist() == [rank(by_count, target) for _, target in asked]
    expected = [
        rank({item: (after[before, item], popular[item]) for item in range(2, SIZE)}, target)
        for before, target in asked
    ]
    assert found["last_item"].tolist() == expected
