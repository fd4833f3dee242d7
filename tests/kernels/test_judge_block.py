"""judge_block: the best classes, log of the sum and rank of the target, as all scores at once give them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protomamba import kernels
from protomamba.kernels import Judging, native, reference

NAN, INF = math.nan, math.inf
SPECIAL = (NAN, INF, -INF, 0.0, -0.0, 1.0, 2.0, -3e38, 3e38)
RESERVED = torch.tensor([0, 3, 40])


def by_blocks(ops: object, scores_TV: Tensor, k: int, width: int, factor: float = 1.0) -> Judging:
    """All that can be found of the scores, in blocks of `width` classes; the target of row t is class 5 t."""
    judging = Judging.empty(len(scores_TV), min(k, scores_TV.shape[1]), scores_TV.dtype)
    targets_T = torch.arange(len(scores_TV)) * 5 % scores_TV.shape[1]
    own_T = scores_TV.gather(1, targets_T[:, None])[:, 0]
    for start in range(0, scores_TV.shape[1], width):
        block_TC = scores_TV[:, start : start + width]
        more = {"own_T": own_T, "targets_T": targets_T, "reserved_R": RESERVED}
        ops.judge_block(block_TC, start, judging, factor=factor, **more)  # type: ignore[attr-defined]
    return judging


def assert_judged(found: Judging, scores_TV: Tensor, k: int, factor: float = 1.0) -> None:
    """By torch, from all scores at once, in float64."""
    exact_TV = scores_TV.double()
    order = exact_TV.sort(dim=1, descending=True, stable=True)
    assert found.classes_TK is not None and torch.equal(found.classes_TK, order.indices[:, :k])
    torch.testing.assert_close(found.values_TK, order.values[:, :k].float(), rtol=0, atol=0, equal_nan=True)
    expected_T = (factor * exact_TV).logsumexp(1)
    torch.testing.assert_close(found.log_sum_T, expected_T, rtol=1e-6, atol=2e-6, equal_nan=True)
    targets_T = torch.arange(len(scores_TV)) * 5 % scores_TV.shape[1]
    counted_TV = ~(exact_TV < exact_TV.gather(1, targets_T[:, None]))
    counted_TV[:, RESERVED[scores_TV.shape[1] > RESERVED]] = False
    assert found.rank_T is not None and torch.equal(found.rank_T, counted_TV.sum(1))


@pytest.mark.parametrize("classes", [1, 7, 63, 257, 2500])
@pytest.mark.parametrize("k", [1, 5, 10, 100])
def test_random_scores(level: str, classes: int, k: int) -> None:
    scores_TV = torch.randn(5, classes)
    for width in (classes, 64, 1100, 13):
        assert_judged(by_blocks(kernels, scores_TV, k, width, 4.0), scores_TV, k, 4.0)


@pytest.mark.parametrize("k", [1, 4, 100])
def test_rising_falling_and_equal_scores(level: str, k: int) -> None:
    """Rising: every class is better than all before it. Equal: the lowest classes, in order."""
    rising = torch.arange(600.0)
    scores_TV = torch.stack([rising, -rising, torch.full((600,), 0.25), rising // 7, -(rising // 7)])
    for width in (600, 64, 13):
        assert_judged(by_blocks(kernels, scores_TV, k, width), scores_TV, k)


@pytest.mark.parametrize("k", [1, 3, 10])
def test_nan_infinities_and_huge_numbers(level: str, k: int) -> None:
    rows = [list(pair) * 9 for pair in itertools.product(SPECIAL, repeat=2)]
    scores_TV = torch.tensor([[*row, 0.5, row[0], *row] for row in rows])
    for width in (scores_TV.shape[1], 16, 5):
        assert_judged(by_blocks(kernels, scores_TV, k, width), scores_TV, k)


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_one_odd_score_anywhere(level: str, bad: float) -> None:
    for place in (0, 1, 16, 1023, 1024, 1999):
        scores_TV = torch.randn(2, 2000)
        scores_TV[1, place] = bad
        assert_judged(by_blocks(kernels, scores_TV, 3, 700), scores_TV, 3)


numbers = st.one_of(st.sampled_from(SPECIAL), st.integers(-3, 3).map(float), st.floats(width=32))


@settings(max_examples=60, deadline=None)
@given(st.lists(numbers, min_size=1, max_size=90), st.integers(1, 100), st.integers(1, 91))
def test_any_scores_in_any_blocks(row: list[float], k: int, width: int) -> None:
    scores_TV = torch.tensor([row, row[::-1]], dtype=torch.float32)
    assert_judged(by_blocks(kernels, scores_TV, k, width), scores_TV, k)


def test_the_twin_is_what_it_says(level: str) -> None:
    """In float64, where the op takes it as well."""
    scores_TV = torch.randn(4, 90)
    for ops in (reference, kernels):
        native.set_kernels("auto")
        found = by_blocks(ops, scores_TV.double(), 7, 20, 2.0)
        assert found.values_TK is not None and found.values_TK.dtype == torch.float64
        assert_judged(found._replace(values_TK=found.values_TK.float()), scores_TV, 7, 2.0)


def test_the_bits_do_not_depend_on_the_threads(library: native.Library) -> None:
    scores_TV, found = torch.randn(37, 3000), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(by_blocks(kernels, scores_TV, 10, 800, 3.0))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True) if a is not None)


def test_what_is_not_wanted_is_not_looked_for(level: str) -> None:
    scores_TV = torch.randn(3, 50)
    whole = by_blocks(kernels, scores_TV, 4, 20)
    only = Judging(log_sum_T=torch.empty(3, dtype=torch.float64))
    best = Judging(torch.empty(3, 4), torch.empty(3, 4, dtype=torch.int64))
    for start in (0, 20, 40):
        for judging in (only, best):
            kernels.judge_block(scores_TV[:, start : start + 20], start, judging)
    assert torch.equal(only.log_sum_T, whole.log_sum_T)  # type: ignore[arg-type]
    assert torch.equal(best.classes_TK, whole.classes_TK)  # type: ignore[arg-type]


def test_a_target_counts_whatever_it_scored_and_a_reserved_class_never(level: str) -> None:
    scores_TV = torch.tensor([[3.0, 1.0, 2.0, 5.0]] * 4)
    judging = Judging(rank_T=torch.empty(4, dtype=torch.int64))
    own_T, targets_T = torch.tensor([1.5, NAN, 5.0, 9.0]), torch.tensor([1, 2, 3, 0])
    kernels.judge_block(scores_TV, 0, judging, own_T=own_T, targets_T=targets_T)
    assert judging.rank_T is not None and judging.rank_T.tolist() == [4, 4, 1, 1]
    kernels.judge_block(scores_TV, 0, judging, own_T=own_T, targets_T=targets_T, reserved_R=torch.tensor([0, 1]))
    assert judging.rank_T.tolist() == [2, 2, 1, 0]


@pytest.mark.parametrize("name", ["values_TK", "classes_TK", "log_sum_T", "rank_T"])
def test_what_is_written_must_be_as_it_is_written(name: str) -> None:
    scores_TC, right = torch.randn(3, 8), Judging.empty(3, 2, torch.float32)._asdict()
    more = {"own_T": torch.zeros(3), "targets_T": torch.arange(3)}
    x = right[name]
    wide = torch.stack([x, x], -1)[..., 0]
    for wrong in (x.to("meta"), x.to(torch.int32 if x.dtype == torch.int64 else torch.float16), wide, x[:2]):
        with pytest.raises(ValueError, match=f"judge_block: {name}: "):
            kernels.judge_block(scores_TC, 0, Judging(**{**right, name: wrong}), **more)


def test_arguments_that_do_not_fit_are_refused() -> None:
    scores_TC, judging = torch.randn(3, 8), Judging.empty(3, 2, torch.float32)
    more = {"own_T": torch.zeros(3), "targets_T": torch.arange(3)}
    with pytest.raises(ValueError, match="start: expected a class, 0 or more, got -1"):
        kernels.judge_block(scores_TC, -1, judging, **more)
    with pytest.raises(ValueError, match="rank_T and own_T and targets_T: expected all of them or none"):
        kernels.judge_block(scores_TC, 0, judging, own_T=torch.zeros(3))
    with pytest.raises(ValueError, match="values_TK and classes_TK: expected all of them or none"):
        kernels.judge_block(scores_TC, 0, judging._replace(classes_TK=None), **more)
    with pytest.raises(ValueError, match="reserved_R: expected classes in rising order"):
        kernels.judge_block(scores_TC, 0, judging, **more, reserved_R=torch.tensor([1, 1]))
