"""The order of windows: each once an epoch, a pure function of the index, and exact across any cut.

The regression tests name the threads in which others describe the failure.
"""

from __future__ import annotations

import json
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data import Prefetcher, TokenStream, batch_from_tokens, eval_batches, in_memory, open_token_dir
from protomamba.data.order import derive_key, permute, shuffled
from protomamba.data.shards import ShardSet
from protomamba.errors import UserError

FIRST_TOKEN = 1000  # shard k holds the tokens k * FIRST_TOKEN + position, so a token tells where it stands


def make_set(*lengths: int) -> ShardSet:
    """Shards in memory whose tokens are all different."""
    parts = [in_memory(range(k * FIRST_TOKEN, k * FIRST_TOKEN + n), f"shard-{k}") for k, n in enumerate(lengths)]
    return ShardSet(tuple(part.shards[0] for part in parts))


def rows_of(stream: TokenStream, start: int, count: int) -> list[tuple[int, ...]]:
    """Inputs and last target of `count` rows from batch `start` on."""
    rows: list[tuple[int, ...]] = []
    for index in range(start, start + -(-count // stream.batch_size)):
        batch = stream.batch(index)
        assert torch.equal(batch.tokens_BL[:, 1:], batch.targets_BL[:, :-1])
        rows += [(*row.tolist(), int(last)) for row, last in zip(batch.tokens_BL, batch.targets_BL[:, -1], strict=True)]
    return rows[:count]


shapes = st.fixed_dictionaries(
    {
        "lengths": st.lists(st.integers(2, 60), min_size=1, max_size=6),
        "batch_size": st.integers(1, 9),
        "seq_len": st.integers(1, 7),
        "seed": st.integers(0, 2**63),
        "packed": st.booleans(),
        "shuffle_shards": st.booleans(),
    }
)


def make_stream(lengths: list[int], **settings_: int) -> TokenStream:
    settings_["seq_len"] = min(settings_["seq_len"], max(lengths) - 1)
    return TokenStream(make_set(*lengths), **settings_)  # type: ignore[arg-type]


@settings(max_examples=150, deadline=None)
@given(shape=shapes, epoch=st.integers(0, 3))
def test_every_transition_once_an_epoch_but_for_the_tails(shape: dict, epoch: int) -> None:
    stream = make_stream(**shape)
    total = stream.rows_per_epoch
    first = epoch * total // stream.batch_size
    skip = epoch * total - first * stream.batch_size
    rows = rows_of(stream, first, skip + total)[skip:]
    seen = Counter(pair for row in rows for pair in pairwise(row))
    expected = Counter(
        (k * FIRST_TOKEN + i, k * FIRST_TOKEN + i + 1)
        for k, n in enumerate(shape["lengths"])
        for i in range((n - 1) // stream.seq_len * stream.seq_len)
    )
    assert seen == expected
    assert stream.dropped_tokens == sum(n - 1 for n in shape["lengths"]) - expected.total()


@settings(max_examples=40, deadline=None)
@given(
    shape=shapes,
    cuts=st.lists(
        st.tuples(st.integers(0, 12), st.sampled_from([0, 1, 2, 4]), st.integers(1, 5)), min_size=1, max_size=5
    ),
)
def test_any_cuts_and_any_workers_continue_the_same_sequence(shape: dict, cuts: list[tuple[int, int, int]]) -> None:
    whole = make_stream(**shape)
    state = json.dumps(whole.state_dict())
    index = 0
    for steps, workers, buffer in cuts:
        stream = make_stream(**shape)
        with Prefetcher(stream, workers, buffer) as batches:
            batches.load_state_dict(json.loads(state))
            for batch in islice(batches, steps):
                expected = whole.batch(index)
                assert torch.equal(batch.tokens_BL, expected.tokens_BL)
                assert torch.equal(batch.targets_BL, expected.targets_BL)
                assert batch.cursor == expected.cursor
                index += 1
            state = json.dumps(batches.state_dict())
        assert stream.position == index, "what was read ahead is not counted"


def test_rows_of_a_packed_batch_are_one_contiguous_run() -> None:
    stream = TokenStream(make_set(100, 100), batch_size=4, seq_len=5, seed=3)
    for index in range(4):
        tokens = stream.batch(index).tokens_BL.flatten().tolist()
        assert tokens == list(range(tokens[0], tokens[0] + 20))


def test_shards_are_reshuffled_each_epoch_only_if_asked() -> None:
    shards = make_set(*[11] * 8)
    orders = {}
    for shuffle in (True, False):
        stream = TokenStream(shards, batch_size=8, seq_len=10, seed=3, shuffle_shards=shuffle)
        orders[shuffle] = [(stream.batch(epoch).tokens_BL[:, 0] // FIRST_TOKEN).tolist() for epoch in range(4)]
    assert orders[False] == [list(range(8))] * 4
    assert len({tuple(order) for order in orders[True]}) == 4


def test_unpacked_windows_are_drawn_anew_each_epoch_and_seed() -> None:
    shards = make_set(401)
    orders = []
    for seed in (0, 1):
        stream = TokenStream(shards, batch_size=40, seq_len=10, seed=seed, packed=False)
        orders += [tuple(stream.batch(epoch).tokens_BL[:, 0].tolist()) for epoch in range(3)]
    assert len(set(orders)) == 6
    assert all(sorted(order) == list(range(0, 400, 10)) for order in orders)


def test_a_batch_straddles_epochs_and_nothing_is_lost() -> None:
    stream = TokenStream(make_set(31), batch_size=4, seq_len=10, seed=0)
    assert [row[0] for row in rows_of(stream, 0, 12)] == [0, 10, 20] * 4
    assert stream.steps_per_epoch == 0.75
    assert [stream.batch(i).epoch for i in range(4)] == [1, 2, 4, 5]


def test_shards_shorter_than_a_window_are_counted_and_reported() -> None:
    stream = TokenStream(make_set(31, 5, 2), batch_size=2, seq_len=10, seed=0)
    assert stream.rows_per_epoch == 3
    assert stream.dropped_tokens == 5
    assert "2 shards shorter than a window" in stream.describe()
    with pytest.raises(UserError, match=r"shard-0: 31 tokens, shorter than one window: expected at least .* 32"):
        TokenStream(make_set(31, 5), batch_size=2, seq_len=31, seed=0)


def test_documents_reset_the_state_after_their_end() -> None:
    shards = in_memory([7, 0, 8, 9, 0, 0, 5, 6, 0])
    kept = TokenStream(shards, batch_size=2, seq_len=4, seed=0, eos_token=0, reset_at_eos=True).batch(0)
    assert kept.tokens_BL.tolist() == [[7, 0, 8, 9], [0, 0, 5, 6]]
    assert kept.reset_BL is not None
    assert kept.reset_BL.tolist() == [[False, False, True, False], [False, True, True, False]]
    assert TokenStream(shards, batch_size=2, seq_len=4, seed=0, eos_token=0).batch(0).reset_BL is None
    evaluated = next(eval_batches(shards, 2, 4, eos_token=0, reset_at_eos=True))
    assert evaluated.reset_BL is not None
    assert torch.equal(evaluated.reset_BL, kept.reset_BL)


def test_the_cursor_is_plain_and_has_the_same_keys_from_the_start() -> None:
    stream = TokenStream(make_set(100), batch_size=2, seq_len=10, seed=5, packed=False)
    keys = list(stream.cursor(0))
    for batch in islice(stream, 20):
        assert list(batch.cursor) == keys
        assert all(type(value) in (int, str) for value in batch.cursor.values())
    assert {**batch.cursor, "shards": stream.shards.identity()} == stream.state_dict()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"batch_size": 3}, "batch_size 2 (now 3)"),
        ({"seq_len": 9}, "seq_len 10 (now 9)"),
        ({"seed": 6}, "seed 5 (now 6)"),
        ({"packed": False}, "packed 1 (now 0)"),
        ({"shuffle_shards": False}, "shuffle_shards 1 (now 0)"),
        ({"eos_token": 3}, "eos_token -1 (now 3)"),
        ({"seed": 6, "seq_len": 9}, "seed 5 (now 6), seq_len 10 (now 9)"),
    ],
)
def test_changed_settings_are_refused_by_name(change: dict, named: str) -> None:
    settings_ = {"batch_size": 2, "seq_len": 10, "seed": 5}
    state = TokenStream(make_set(100), **settings_).state_dict()
    with pytest.raises(UserError) as caught:
        TokenStream(make_set(100), **{**settings_, **change}).load_state_dict(state)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda d: (d / "b.txt").write_text("1 2 3 9"), "shard b.txt has other contents"),
        (lambda d: (d / "a0.txt").write_text("1 2 3 9"), "shard 1 was b.txt, is now a0.txt"),
        (lambda d: (d / "c.txt").write_text("1 2 3 9"), "shard c.txt is new"),
        (lambda d: (d / "b.txt").unlink(), "shard b.txt is missing"),
    ],
)
def test_changed_data_is_refused_by_the_name_of_the_shard(tmp_path: Path, change, named: str) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text("1 2 3 4")
    settings_ = {"batch_size": 1, "seq_len": 2, "seed": 0}
    state = TokenStream(open_token_dir(tmp_path), **settings_).state_dict()
    change(tmp_path)
    with pytest.raises(UserError) as caught:
        TokenStream(open_token_dir(tmp_path), **settings_).load_state_dict(state)
    assert named in str(caught.value)


def test_another_split_of_the_same_file_is_refused() -> None:
    shards = make_set(100)
    settings_ = {"batch_size": 1, "seq_len": 2, "seed": 0}
    state = TokenStream(shards.split(0.1)[0], **settings_).state_dict()
    with pytest.raises(UserError, match=r"90 tokens from 0 were used, now 80 from 0: was --val-ratio changed"):
        TokenStream(shards.split(0.2)[0], **settings_).load_state_dict(state)


def test_damaged_cursors_are_refused() -> None:
    stream = TokenStream(make_set(100), batch_size=1, seq_len=2, seed=0)
    good = stream.state_dict()
    for bad in ({**good, "version": 2}, {**good, "batch": -1}, {**good, "epoch": 1}, {**good, "batch": "0"}):
        with pytest.raises(UserError, match="stream cursor"):
            stream.load_state_dict(bad)
    with pytest.raises(UserError, match="damaged: no window"):
        stream.load_state_dict({key: value for key, value in good.items() if key != "window"})


class TestFailuresOthersPublished:
    """Each is a way in which a resumed run silently saw other data."""

    @staticmethod
    def fresh() -> TokenStream:
        return TokenStream(make_set(41, 33, 27), batch_size=2, seq_len=4, seed=9, packed=False)

    @pytest.mark.parametrize("epoch", [1, 2, 5])
    def test_resume_in_a_later_epoch_keeps_its_order(self, epoch: int) -> None:
        """huggingface/accelerate #2016: epoch >= 2 replayed the order of epoch 0."""
        whole, resumed = self.fresh(), self.fresh()
        whole.position = int(epoch * whole.steps_per_epoch) + 2
        resumed.load_state_dict(whole.state_dict())
        assert torch.equal(next(resumed).tokens_BL, next(whole).tokens_BL)
        first_epoch = whole.batch(2).tokens_BL
        assert not torch.equal(whole.batch(int(epoch * whole.steps_per_epoch) + 2).tokens_BL, first_epoch)

    def test_a_chain_of_resumes(self) -> None:
        """huggingface/datasets #8308: the second resume restarted the stream."""
        whole = self.fresh()
        state = whole.state_dict()
        for _ in range(6):
            resumed = self.fresh()
            resumed.load_state_dict(state)
            for batch in islice(resumed, 5):
                assert torch.equal(batch.tokens_BL, next(whole).tokens_BL)
            state = resumed.state_dict()

    @pytest.mark.parametrize("workers", [1, 2, 4])
    def test_saving_at_every_offset_loses_nothing_read_ahead(self, workers: int) -> None:
        """meta-pytorch/data #1520 (prefetched batches dropped), #1251 (state incomplete before `workers` batches)."""
        whole = self.fresh()
        for offset in range(2 * workers + 1):
            with Prefetcher(self.fresh(), workers, buffer=8) as batches:
                for _ in range(offset):
                    next(batches)
                state = batches.state_dict()
            resumed = self.fresh()
            # Lightning-AI/pytorch-lightning #12285: resuming with another number of workers
            with Prefetcher(resumed, (workers + 1) % 5, buffer=3) as batches:
                batches.load_state_dict(state)
                assert torch.equal(next(batches).tokens_BL, whole.batch(offset).tokens_BL)

    def test_resume_at_an_epoch_boundary_goes_on(self) -> None:
        """verl-project/verl #5725: resuming exactly at the end of an epoch trained 0 steps."""
        shards = make_set(41)
        whole = TokenStream(shards, batch_size=2, seq_len=4, seed=9, packed=False)
        assert whole.steps_per_epoch == 5
        for boundary in (5, 10):
            whole.position = boundary
            resumed = TokenStream(shards, batch_size=2, seq_len=4, seed=9, packed=False)
            resumed.load_state_dict(whole.state_dict())
            assert resumed.state_dict()["window"] == 0
            rows = [row for batch in islice(resumed, 5) for row in batch.tokens_BL[:, 0].tolist()]
            assert sorted(rows) == list(range(0, 40, 4))

    def test_later_epochs_are_as_long_after_a_resume(self) -> None:
        """huggingface/datasets #7447 (shortened epochs), #7901 (duplicates): the exact multiset of each epoch."""
        stream = self.fresh()
        total = stream.rows_per_epoch
        stream.position = 3
        resumed = self.fresh()
        resumed.load_state_dict(stream.state_dict())
        rows = [row for batch in islice(resumed, 3 * total) for row in batch.tokens_BL[:, 0].tolist()]
        seen_before = [row for index in range(3) for row in self.fresh().batch(index).tokens_BL[:, 0].tolist()]
        rows = seen_before + rows
        epochs = [sorted(rows[k * total : (k + 1) * total]) for k in range(len(rows) // total)]
        assert len(epochs) >= 6
        assert all(epoch == epochs[0] for epoch in epochs)


def test_eval_windows_are_fixed_distinct_and_spread() -> None:
    shards = make_set(101, 101)
    first, again = ([b.tokens_BL for b in eval_batches(shards, 4, 10, 2)] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    starts = torch.cat(first)[:, 0].tolist()
    assert starts == [0, 20, 50, 70, 1000, 1020, 1050, 1070]
    everything = [int(token) for b in eval_batches(shards, 3, 10) for token in b.tokens_BL[:, 0]]
    assert everything == [*range(0, 100, 10), *range(1000, 1100, 10)]
    with pytest.raises(UserError, match="shorter than one window"):
        eval_batches(shards, 4, 101, 2)


def test_batch_from_tokens_wraps_around_the_end() -> None:
    ids, targets = batch_from_tokens(list(range(8192)), cursor=0, batch_size=8, seq_len=64)
    assert ids.shape == targets.shape == (8, 64)
    assert ids.dtype == targets.dtype == torch.int64
    assert ids.flatten().tolist() == list(range(512))
    assert torch.equal(targets, ids + 1)
    ids, targets = batch_from_tokens(torch.tensor([5, 6, 7]), cursor=1, batch_size=2, seq_len=4)
    assert ids.tolist() == [[6, 7, 5, 6], [7, 5, 6, 7]]
    assert targets.tolist() == [[7, 5, 6, 7], [5, 6, 7, 5]]
    for bad in (([1], 0, 1, 1), ([1, 2], -1, 1, 1), ([1, 2], 0, 0, 1), ([1, 2], 0, 1, 0)):
        with pytest.raises(ValueError, match="expected at least 2 tokens"):
            batch_from_tokens(*bad)


@given(size=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_is_a_permutation_and_needs_no_neighbours(size: int, key: int) -> None:
    found = permute(np.arange(size), size, key)
    assert np.array_equal(np.sort(found), np.arange(size))
    place = key % size
    assert permute(np.array([place]), size, key)[0] == found[place]
    assert np.array_equal(np.sort(shuffled(size, key)), np.arange(size))


@pytest.mark.parametrize("size", [2**31 + 11, 10**12])
def test_permute_of_ranges_too_long_to_hold(size: int) -> None:
    index = np.arange(0, size, size // 1000)
    found = permute(index, size, 7)
    assert np.unique(found).size == index.size
    assert found.min() >= 0 and found.max() < size
    assert abs(found.mean() / size - 0.5) < 0.05, "spread over the whole range"
    with pytest.raises(IndexError):
        permute(np.array([size]), size, 7)


def test_orders_look_random() -> None:
    """Correlation of neighbours, of place and value, and of two epochs: below 4 standard deviations of chance."""
    size = 50_000
    first, second = (permute(np.arange(size), size, derive_key(1, epoch)) for epoch in (0, 1))
    for a, b in ((first[1:], first[:-1]), (first, np.arange(size)), (first, second)):
        assert abs(np.corrcoef(a, b)[0, 1]) * size**0.5 < 4
    counts = Counter(tuple(shuffled(4, derive_key(seed, 0))) for seed in range(2400))
    assert len(counts) == 24
    assert sum((n - 100) ** 2 / 100 for n in counts.values()) < 60  # chi-squared, 23 degrees of freedom: p < 1e-4
