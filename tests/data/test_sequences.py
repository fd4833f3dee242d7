"""Sequences with boundaries: every transition trained once an epoch, with its own past and nothing else's."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data.packing import CONTEXT_SHARE, pack
from protomamba.data.sequences import IGNORED, SequenceSet
from protomamba.data.shards import in_memory
from protomamba.data.source import DataInfo, StreamSpec
from protomamba.data.vocabulary import BOUNDARY, UNKNOWN
from protomamba.data.windows import Batch
from protomamba.errors import ConfigError, UserError

STEP = 1000  # sequence s holds the tokens (s + 1) * STEP + position: a token tells where it stands
BASES = np.array([0, 1, 5, 4, 3, 2])  # complement of tokens 2..5


def make(lengths: list[int], judged: list[int] | None = None) -> SequenceSet:
    tokens = np.concatenate([(s + 1) * STEP + np.arange(n) for s, n in enumerate(lengths)])
    stops = np.cumsum(lengths)
    starts = stops - lengths
    firsts = starts + (np.zeros(len(lengths), dtype=int) if judged is None else np.array(judged))
    about = DataInfo(vocab_size=int(tokens.max()) + 1, reset=True)
    return SequenceSet(in_memory(np.append(tokens, 0)), np.stack((starts, firsts, stops), axis=1), about)


def transitions(batch: Batch) -> list[tuple[int, int, tuple[int, ...]]]:
    """(input, target, the inputs since the last reset) of every target."""
    found = []
    assert batch.reset_BL is not None
    for row, (inputs, targets) in enumerate(zip(batch.tokens_BL.tolist(), batch.targets_BL.tolist(), strict=True)):
        since = 0
        for place, target in enumerate(targets):
            since = place if batch.reset_BL[row, place] else since
            if target != IGNORED:
                found.append((inputs[place], target, tuple(inputs[since : place + 1])))
    return found


lengths_ = st.lists(st.integers(1, 40), min_size=1, max_size=12)
shapes = {"batch_size": st.integers(1, 5), "seq_len": st.integers(1, 17), "seed": st.integers(0, 2**63 - 1)}


@settings(max_examples=120, deadline=None)
@given(lengths=lengths_, epoch=st.integers(0, 2), **shapes)
def test_every_transition_once_an_epoch_with_its_own_past(
    lengths: list[int], epoch: int, batch_size: int, seq_len: int, seed: int
) -> None:
    source = make(lengths)
    stream = source.stream(StreamSpec(batch_size=1, seq_len=seq_len, seed=seed))
    rows = len(stream.packing)
    found = [each for i in range(epoch * rows, (epoch + 1) * rows) for each in transitions(stream[i])]
    expected = [(s + 1) * STEP + j for s, n in enumerate(lengths) for j in range(n)]
    assert sorted(target for _, target, _ in found) == expected
    for _, target, past in found:
        position = target % STEP
        whole = (BOUNDARY, *range(target - position, target))
        assert past == whole[len(whole) - len(past) :], "a past of another sequence, or with a gap"
        assert len(past) >= min(position + 1, int(seq_len * CONTEXT_SHARE) + 1)
    wide = source.stream(StreamSpec(batch_size=batch_size, seq_len=seq_len, seed=seed))
    several = [each for i in range(3) for each in transitions(wide[i])]
    single = [each for i in range(3 * batch_size) for each in transitions(stream[i])]
    assert several == single, "the batch size changes no row"


@settings(max_examples=80, deadline=None)
@given(data=st.data(), lengths=lengths_, seq_len=st.integers(1, 17))
def test_only_what_is_judged_is_a_target_with_all_the_past_that_fits(
    data: st.DataObject, lengths: list[int], seq_len: int
) -> None:
    judged = [data.draw(st.integers(0, n)) for n in lengths]
    source = make(lengths, judged)
    expected = sorted((s + 1) * STEP + j for s, n in enumerate(lengths) for j in range(judged[s], n))
    assert source.info.targets == len(expected)
    if not expected:
        return
    found = [e for b in source.eval_batches(StreamSpec(2, seq_len)) for e in transitions(b)]
    assert sorted(target for _, target, _ in found) == expected
    for sequence, (first, length) in enumerate(zip(judged, lengths, strict=True)):
        if first == length - 1:
            past = next(past for _, target, past in found if target == (sequence + 1) * STEP + first)
            assert len(past) == min(length, seq_len)


@settings(max_examples=60, deadline=None)
@given(lengths=lengths_, block=st.integers(1, 30), data=st.data())
def test_transitions_are_read_in_blocks(lengths: list[int], block: int, data: st.DataObject) -> None:
    judged = [data.draw(st.integers(0, n)) for n in lengths]
    pairs = [(int(a), int(b)) for p, t in make(lengths, judged).transitions(block) for a, b in zip(p, t, strict=True)]
    expected = [
        ((s + 1) * STEP + j - 1 if j else BOUNDARY, (s + 1) * STEP + j)
        for s, n in enumerate(lengths)
        for j in range(judged[s], n)
    ]
    assert pairs == expected


def test_rows_are_shuffled_by_seed_and_epoch() -> None:
    source = make([3] * 200)
    first = {
        (seed, epoch): tuple(source.stream(StreamSpec(20, 30, seed))[epoch].tokens_BL.flatten().tolist())
        for seed in (1, 2)
        for epoch in (0, 1)
    }
    assert len(set(first.values())) == 4


@pytest.mark.parametrize("seq_len", [5, 4, 3, 20])
def test_each_epoch_reads_half_of_the_sequences_from_the_other_strand(seq_len: int) -> None:
    tokens = np.tile([2, 3, 3, 5, 4], 40)
    spans = np.stack((np.arange(0, 200, 5), np.arange(0, 200, 5), np.arange(5, 205, 5)), axis=1)
    source = SequenceSet(in_memory(np.append(tokens, 0)), spans, DataInfo(vocab_size=6), complement=BASES)
    one, other = (Counter(zip((BOUNDARY, *s[:-1]), s, strict=True)) for s in ((2, 3, 3, 5, 4), (3, 2, 4, 4, 5)))
    stream = source.stream(StreamSpec(1, seq_len, 3))
    rows, strands = len(stream.packing), []
    for epoch in range(2):
        found = [e for i in range(epoch * rows, (epoch + 1) * rows) for e in transitions(stream[i])]
        counts = Counter((before, target) for before, target, _ in found)
        turned = counts[BOUNDARY, 3]
        assert counts == Counter({k: one[k] * (40 - turned) + other[k] * turned for k in one | other})
        strands.append(turned)
    assert all(10 <= each <= 30 for each in strands)
    firsts = {t for b in source.eval_batches(StreamSpec(4, seq_len)) for p, t, _ in transitions(b) if p == BOUNDARY}
    assert firsts == {2}, "an evaluation reads what is there"


def test_unknown_items_are_read_and_never_a_target() -> None:
    tokens = [5, UNKNOWN, 7]
    source = SequenceSet(in_memory([*tokens, 0]), np.array([[0, 0, 3]]), DataInfo(vocab_size=8))
    batch = source.stream(StreamSpec(1, 4))[0]
    assert batch.tokens_BL.tolist() == [[BOUNDARY, 5, UNKNOWN]]
    assert batch.targets_BL.tolist() == [[5, IGNORED, 7]]
    assert source.class_counts().tolist() == [0, 0, 0, 0, 0, 1, 0, 1]


@pytest.mark.parametrize("count", [1, 3, 40])
def test_a_split_shares_no_target(count: int) -> None:
    training, held_out = make([20] * count).split(0.2, 4)
    targets = [Counter(int(t) for _, ts in part.transitions() for t in ts) for part in (training, held_out)]
    assert not targets[0] & targets[1] and sum((targets[0] + targets[1]).values()) == 20 * count
    assert sum(targets[1].values()) == pytest.approx(4 * count, abs=20 if count == 40 else 0)
    assert "held out" in training.notes[0]


def test_a_split_that_cannot_be_made() -> None:
    with pytest.raises(UserError, match="too few to hold out"):
        make([2]).split(0.1, 0)
    with pytest.raises(ConfigError, match=r"--val-ratio 0\.1: `prepare` has split the data already .--split last"):
        replace(make([2] * 30), split_by="last").split(0.1, 0)


def test_a_saved_place_is_refused_for_other_sequences_or_shapes() -> None:
    source = make([5] * 30)
    state = source.stream(StreamSpec(2, 8, 1)).state_dict()
    for other, spec, says in (
        (make([5] * 31), StreamSpec(2, 8, 1), "data changed: shard tokens"),
        (source.part(source.spans[:20], "train"), StreamSpec(2, 8, 1), "spans of train has other contents"),
        (source, StreamSpec(2, 9, 1), "seq_len 8 .now 9"),
    ):
        with pytest.raises(UserError, match=says):
            other.stream(spec).load_state_dict(state)


def test_shares_of_the_rows_are_told() -> None:
    source = make([30, 4, 4, 4])
    said = source.stream(StreamSpec(2, 16)).describe()
    # 30 transitions in windows of 16 with 4 of context: 16, then 12 and 2 new ones; the short ones fill up to 12
    assert "4 sequences of 4 to 30 tokens" in said and "4 rows of 16 an epoch" in said
    assert "65.6% of them trained, 12.5% context" in said and "21.9% empty" in said
    assert pack(np.array([3]), np.array([0]), 3, 0).describe().startswith("1 row of 3 an epoch: 100.0% of them")


def test_an_empty_part_says_so() -> None:
    source = make([3]).part(np.empty((0, 3), dtype=np.int64), "valid")
    for make_batches in (source.stream, source.eval_batches):
        with pytest.raises(UserError, match="the valid part has no sequence"):
            make_batches(StreamSpec(1, 4))
    assert torch.is_tensor(make([3]).stream(StreamSpec(1, 4))[0].tokens_BL)
