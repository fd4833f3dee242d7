"""The class that each is taken for most easily, and samples that have it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from protomamba import ModelConfig
from protomamba.model.heads import rivals
from protomamba.model.heads.hypersphere import HyperspherePrototypes
from protomamba.model.heads.softmax import SoftmaxHead


def by_hand(table_VD: Tensor) -> Tensor:
    unit_VD = F.normalize(table_VD, dim=-1)
    return (unit_VD @ unit_VD.t()).fill_diagonal_(-2.0).argmax(-1)


@pytest.mark.parametrize(("classes", "width"), [(2, 4), (40, 7), (700, 16)])
def test_among_all_the_nearest_is_found(classes: int, width: int) -> None:
    torch.manual_seed(0)
    table_VD, everyone_V = 3 * torch.randn(classes, width), torch.arange(classes)
    found_V = rivals.nearest(table_VD, everyone_V, range(classes), everyone_V)
    assert torch.equal(found_V, by_hand(table_VD))


def test_what_was_found_stays_until_something_nearer_is() -> None:
    torch.manual_seed(0)
    table_VD, everyone_V, limit = torch.randn(300, 8), torch.arange(300), 64
    found_V, cosine_VV = everyone_V, F.normalize(table_VD) @ F.normalize(table_VD).t()
    before_V = torch.full((300,), -1.0)
    for start in range(0, 300, limit):
        found_V = rivals.nearest(table_VD, everyone_V, range(start, min(start + limit, 300)), found_V)
        now_V = cosine_VV[everyone_V, found_V].masked_fill(found_V == everyone_V, -1.0)
        assert bool((now_V >= before_V).all())
        before_V = now_V
    assert torch.equal(found_V, by_hand(table_VD))


@pytest.mark.parametrize(("classes", "width"), [(60, 8), (5_000, 128), (40_000, 128), (1_000_000, 512)])
def test_a_search_is_bounded_and_comes_round(classes: int, width: int) -> None:
    common_U, seen, places = torch.arange(0, classes, max(1, classes // 700)), set[int](), set[int]()
    for search in range(200):
        probe_P, among = rivals.probes(search, common_U, classes, width)
        assert len(probe_P) * len(among) * width <= rivals.WORK and len(among) <= rivals.AMONG
        assert bool((probe_P.diff() > 0).all()) and int(probe_P[0]) >= 0 and int(probe_P[-1]) < classes
        seen |= set(probe_P.tolist())
        places |= set(among)
    assert len(places) == classes and (len(seen) == classes or classes > 100_000)


@pytest.mark.parametrize("kind", [HyperspherePrototypes, SoftmaxHead])
def test_a_step_s_samples_have_the_rivals_of_their_rows_for_certain(
    kind: type[HyperspherePrototypes] | type[SoftmaxHead],
) -> None:
    torch.manual_seed(0)
    name = "hpn" if kind is HyperspherePrototypes else "softmax"
    head = kind(ModelConfig(vocab_size=200, d_model=8, head=name, head_options={"sample": 60}))
    head.set_frequencies(torch.arange(1, 201))
    table_VD = head.prototypes if isinstance(head, HyperspherePrototypes) else head.weight
    nearest_V = by_hand(table_VD.detach())
    targets_BL = torch.randint(200, (3, 6))
    head(torch.randn(3, 6, 8), targets_BL).backward()
    assert torch.equal(head.rivals, nearest_V)
    expected_V = torch.zeros(200, dtype=torch.int64).index_add_(0, nearest_V, torch.arange(1, 201))
    assert torch.equal(head.rival_counts, expected_V)
    (sample,) = head.next_samples(targets_BL)
    assert sample.tokens_R == (6, 6, 6)
    for targets_L, log_chance_S in zip(targets_BL, sample.log_chance_RS, strict=True):
        told = torch.cat([targets_L, nearest_V[targets_L]])
        assert bool(torch.isin(told, sample.classes_S).all())
        inside_S = torch.isin(sample.classes_S, told)
        assert bool((log_chance_S[inside_S].abs() < 1e-6).all()) and bool((log_chance_S[~inside_S] < -1e-3).all())


def test_rivals_are_looked_for_now_and_then_and_kept_with_the_weights() -> None:
    head = HyperspherePrototypes(ModelConfig(vocab_size=200, d_model=8, head_options={"sample": 60}))
    found = list[Tensor]()
    for _ in range(rivals.EVERY + 1):
        head(torch.randn(9, 8), torch.randint(200, (9,))).backward()
        found.append(head.rivals.clone())
        with torch.no_grad():
            head.prototypes.copy_(torch.randn(200, 8))
    assert all(torch.equal(found[0], each) for each in found[: rivals.EVERY])
    assert not torch.equal(found[0], found[-1])
    assert torch.equal(head.state_dict()["rivals"], found[-1])
