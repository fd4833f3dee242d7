"""draw_classes against its definition in float64, and what its bits must not depend on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba.kernels import draw_classes, native, reference
from protomamba.kernels.reference import DrawnClasses

Inputs = tuple[Tensor, Tensor, list[Tensor], list[int], Tensor]


def inputs(groups: int, classes: int, limits: list[int], own: int) -> Inputs:
    logits_GKC = 3 * torch.randn(groups, 8, classes)
    size_GK = torch.randint(0, 80, (groups, 8)).float()
    certain = [torch.randint(classes, (own,)) for _ in range(groups)]  # some of them twice
    return logits_GKC, size_GK, certain, limits, torch.rand(groups, dtype=torch.float64)


def assert_drawn_alike(found: list[DrawnClasses], expected: list[DrawnClasses]) -> None:
    """The same chances; and the same places, where rounding did not carry one over to its neighbour."""
    for mine, exact in zip(found, expected, strict=True):
        assert mine.places_S.dtype == torch.int64 and bool((mine.places_S.diff() > 0).all())
        chance = {int(place): float(x) for place, x in zip(*exact, strict=True)}
        common = [i for i, place in enumerate(mine.places_S.tolist()) if place in chance]
        assert len(common) >= max(len(mine.places_S), len(chance)) - 1
        told = torch.tensor([chance[int(mine.places_S[i])] for i in common], dtype=torch.float64)
        torch.testing.assert_close(mine.log_chance_S[common], told, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("classes", "limits", "own"),
    [(300, [40, 100, 7], 12), (37, [37, 5, 60], 2), (1, [1, 1, 1], 1), (2_000, [512, 1_000, 64], 200)],
    ids=str,
)
def test_against_the_definition(level: str, classes: int, limits: list[int], own: int) -> None:
    given = inputs(3, classes, limits, own)
    expected = reference.draw_classes(given[0].double(), given[1].double(), *given[2:])
    found = draw_classes(*given)
    assert_drawn_alike(found, expected)
    for each, limit in zip(found, limits, strict=True):
        assert len(each.places_S) <= limit


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_logits_that_are_no_numbers_make_even_chances(level: str, bad: float) -> None:
    logits_GKC, size_GK, _, limits, start_G = inputs(2, 90, [30, 30], 0)
    logits_GKC[0] = bad
    size_GK[1] = 0
    for each in draw_classes(logits_GKC, size_GK, [torch.empty(0, dtype=torch.int64)] * 2, limits, start_G):
        torch.testing.assert_close(
            each.log_chance_S.exp(), torch.full_like(each.log_chance_S, 30 / 90), rtol=1e-3, atol=0
        )


def test_the_logits_stay(level: str) -> None:
    given = inputs(2, 50, [20, 10], 3)
    before = given[0].clone()
    draw_classes(*given)
    assert torch.equal(given[0], before)


def test_the_same_bits_on_any_number_of_threads(library: native.Library) -> None:
    given, found = inputs(5, 700, [100, 200, 300, 400, 500], 30), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(draw_classes(*given))
    for other in found[1:]:
        assert all(torch.equal(a, b) for x, y in zip(found[0], other, strict=True) for a, b in zip(x, y, strict=True))


def test_what_does_not_fit_is_refused(level: str) -> None:
    logits_GKC, size_GK, own, limits, start_G = inputs(2, 50, [20, 10], 3)
    with pytest.raises(ValueError, match="size_GK: expected shape"):
        draw_classes(logits_GKC, size_GK[:, 1:], own, limits, start_G)
    with pytest.raises(ValueError, match="own, limit_G: expected 2, got 1 and 2"):
        draw_classes(logits_GKC, size_GK, own[1:], limits, start_G)
    with pytest.raises(ValueError, match="own: expected places from 0 to 49"):
        draw_classes(logits_GKC, size_GK, [own[0], torch.tensor([50])], limits, start_G)
