"""Ranks over all classes and the figures made of them, against the definition."""

from __future__ import annotations

import math

import pytest
import torch

from protomamba.config import ModelConfig
from protomamba.model.heads import base
from protomamba.model.heads.ranking import ranking_figures, ranks, ranks_of_targets
from protomamba.model.heads.softmax import SoftmaxHead


def test_a_rank_counts_the_classes_that_score_at_least_as_high() -> None:
    scores = torch.tensor([[3.0, 9.0, 5.0, 4.0], [1.0, 1.0, 1.0, 1.0], [float("nan"), 2.0, 1.0, 3.0]])
    targets = torch.tensor([2, 1, 1])
    assert ranks(scores, targets).tolist() == [2, 4, 3]
    assert ranks(scores, targets, reserved=(1,)).tolist()[0] == 1
    assert ranks(torch.full((1, 4), float("nan")), torch.tensor([2])).tolist() == [4]
    assert ranks(scores[1:2], targets[1:2], reserved=(0,)).tolist() == [3], "equal scores: the worst place"


def test_figures_are_those_of_the_definition() -> None:
    found = ranking_figures(torch.tensor([1, 3, 20, 7]), cuts=(1, 5))
    assert found == {
        "hit@1": 0.25,
        "ndcg@1": 0.25,
        "hit@5": 0.5,
        "ndcg@5": pytest.approx((1 + 1 / math.log2(4)) / 4),
        "mrr": pytest.approx((1 + 1 / 3 + 1 / 20 + 1 / 7) / 4),
    }
    assert ranking_figures(torch.zeros(0, dtype=torch.int64)) == {}


def test_targets_are_ranked_in_blocks_as_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    head = SoftmaxHead(ModelConfig(vocab_size=11, d_model=6))
    generator = torch.Generator().manual_seed(0)
    z, targets = torch.randn(3, 5, 6, generator=generator), torch.randint(-1, 11, (3, 5), generator=generator)
    kept = targets >= 0
    expected = ranks(head.scores(z[kept]), targets[kept], reserved=(0, 1))
    monkeypatch.setattr(base, "BLOCK_SCORES", 22)
    assert torch.equal(ranks_of_targets(head, z, targets, reserved=(0, 1)), expected)
    assert len(ranks_of_targets(head, z, torch.full_like(targets, -100))) == 0


def test_ranks_over_very_many_classes_are_those_over_few(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    head = SoftmaxHead(ModelConfig(vocab_size=37, d_model=6))
    with torch.no_grad():
        head.weight[5] = head.weight[9]  # two classes with equal scores
    z_BLD, targets_BL = torch.randn(4, 9, 6), torch.randint(-1, 37, (4, 9))
    targets_BL[0, :2] = torch.tensor([5, 9])
    few = ranks_of_targets(head, z_BLD, targets_BL, reserved=(0, 1))
    monkeypatch.setattr("protomamba.model.heads.ranking.MANY", 10)
    monkeypatch.setattr("protomamba.model.heads.many.BLOCK_SCORES", 200)
    assert torch.equal(ranks_of_targets(head, z_BLD, targets_BL, reserved=(0, 1)), few)
