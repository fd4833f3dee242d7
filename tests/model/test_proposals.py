"""Classes drawn in proportion to what they add to a sum, told by means of features."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba.kernels.reference.proposals import EVEN, SLACK, chances, drawn, weights
from protomamba.model.heads import proposals
from protomamba.model.heads.proposals import CENTROIDS


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("tokens", [0, 1, CENTROIDS - 1, CENTROIDS, CENTROIDS + 1, 300])
def test_every_token_counts_once_and_the_means_are_theirs(tokens: int) -> None:
    features_TD = torch.randn(tokens, 5, generator=generator())
    centroid_KD, tokens_K = proposals.centroids(features_TD, generator())
    assert centroid_KD.shape == (CENTROIDS, 5) and int(tokens_K.sum()) == tokens
    torch.testing.assert_close(tokens_K @ centroid_KD, features_TD.sum(0), rtol=1e-4, atol=1e-4)
    if tokens <= CENTROIDS:
        assert torch.equal(centroid_KD[:tokens], features_TD) and not bool(tokens_K[tokens:].any())


def test_tokens_that_are_apart_have_means_of_their_own() -> None:
    """Of two heaps, both of which have a token among the first ones, no mean lies between."""
    heaps_TD = torch.cat([torch.randn(100, 4), torch.randn(100, 4) + 50.0])
    centroid_KD, tokens_K = proposals.centroids(heaps_TD, generator())
    sums_K = centroid_KD[tokens_K > 0].mean(1)
    assert bool(((sums_K < 5) | (sums_K > 45)).all()) and bool((sums_K < 5).any()) and bool((sums_K > 45).any())


def test_weights_are_the_roots_of_the_sums_of_squared_probabilities() -> None:
    logits_GKC, tokens_GK = torch.randn(2, CENTROIDS, 9), torch.randint(5, (2, CENTROIDS)).float()
    found_GC = weights(logits_GKC, tokens_GK)
    for logits_KC, tokens_K, found_C in zip(logits_GKC.double(), tokens_GK.double(), found_GC, strict=True):
        root_C = (tokens_K[:, None] * logits_KC.softmax(-1) ** 2).sum(0).sqrt()
        torch.testing.assert_close(found_C, root_C / root_C.sum(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_where_there_is_no_weight_all_are_alike(value: float) -> None:
    logits_GKC, tokens_GK = torch.zeros(2, CENTROIDS, 9), torch.zeros(2, CENTROIDS)
    tokens_GK[0], logits_GKC[0] = 1.0, value
    torch.testing.assert_close(weights(logits_GKC, tokens_GK), torch.full((2, 9), 1 / 9, dtype=torch.float64))


def weights_of(kind: str, classes: int) -> Tensor:
    rank_C = torch.arange(1, classes + 1, dtype=torch.float64)
    found = {"even": torch.ones_like(rank_C), "zipf": 1 / rank_C, "steep": rank_C**-6, "one": (rank_C == 3).double()}
    return (found[kind] / found[kind].sum())[None]


def none(weight_GC: Tensor) -> Tensor:
    return torch.zeros_like(weight_GC, dtype=torch.bool)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("kind", ["even", "zipf", "steep", "one"])
@pytest.mark.parametrize(("classes", "limit"), [(50, 2), (50, 16), (50, 49), (50, 50), (20, 40), (5_000, 1_024)])
def test_chances_sum_to_the_limit_and_follow_the_weights(kind: str, classes: int, limit: int, own: bool) -> None:
    weight_GC = weights_of(kind, classes)
    own_GC = torch.arange(classes)[None] % 7 == 5 if own else none(weight_GC)
    (chance_C,) = chances(weight_GC, own_GC, torch.tensor([limit]))
    assert float(chance_C.sum()) == pytest.approx(limit - SLACK if limit < classes else classes, abs=1e-6)
    assert float(chance_C.min()) > 0 and float(chance_C.max()) <= 1
    if int(own_GC.sum()) > limit // 2:  # no room for all of them
        own_GC = none(weight_GC)
    assert bool((chance_C[own_GC[0]] == 1).all())
    ratio_C = chance_C / ((1 - EVEN) * weight_GC[0] + EVEN / classes)
    inside = chance_C < 1
    if bool(inside.any()):
        torch.testing.assert_close(ratio_C[inside], ratio_C[inside][:1].expand(int(inside.sum())))
        assert bool((ratio_C[~inside & ~own_GC[0]] <= ratio_C[inside][0] * (1 + 1e-9)).all())


def test_few_tokens_are_held_against_half_of_a_sample() -> None:
    rooms = {0: 512, 1: 512, 8: 512, 9: 576, 15: 960, 16: 1_024, 512: 1_024}
    assert {tokens: proposals.room(tokens, 1_024) for tokens in rooms} == rooms
    assert [proposals.room(tokens, 1) for tokens in (0, 1, 512)] == [1, 1, 1]


def test_groups_are_independent() -> None:
    weight_GC = torch.cat([weights_of(kind, 50) for kind in ("even", "zipf", "steep", "one")])
    own_GC = torch.rand(4, 50, generator=generator()) < 0.2
    limit_G = torch.tensor([16, 40, 50, 7])
    together_GC = chances(weight_GC, own_GC, limit_G)
    for weight_C, own_C, limit, chance_C in zip(weight_GC, own_GC, limit_G, together_GC, strict=True):
        alone_GC = chances(weight_C[None], own_C[None], limit[None])
        torch.testing.assert_close(alone_GC[0], chance_C, rtol=1e-12, atol=0.0)


@pytest.mark.parametrize("kind", ["even", "zipf", "steep"])
def test_each_is_drawn_as_often_as_its_chance_says(kind: str) -> None:
    weight_GC, draws = weights_of(kind, 60), 20_000
    chance_GC = chances(weight_GC, none(weight_GC), torch.tensor([20]))
    seen_C, draw = torch.zeros(60), generator()
    for start_G in torch.rand(draws, 1, generator=draw, dtype=torch.float64):
        (places_S,) = drawn(chance_GC, start_G)
        assert len(places_S) in (19, 20) and bool((places_S.diff() > 0).all())
        seen_C[places_S] += 1
    noise_C = (chance_GC[0] * (1 - chance_GC[0]) / draws).sqrt()
    assert bool(((seen_C / draws - chance_GC[0]).abs() <= 4.5 * noise_C + 1e-6).all())


@pytest.mark.parametrize("start", [0.0, SLACK / 2, 0.5, 1 - 2**-53])
def test_never_more_than_the_limit(start: float) -> None:
    for classes, limit in ((2_000, 1_024), (16_384, 1_024), (50, 49), (50, 50)):
        for kind in ("even", "zipf", "steep", "one"):
            weight_GC = weights_of(kind, classes)
            chance_GC = chances(weight_GC, none(weight_GC), torch.tensor([limit]))
            (found,) = drawn(chance_GC, torch.tensor([start], dtype=torch.float64))
            assert limit - 1 <= len(found) <= limit
