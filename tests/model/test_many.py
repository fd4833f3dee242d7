"""Judging over very many classes in one pass is what judging over all scores at once is."""

from __future__ import annotations

import pytest
import torch

from protomamba import ModelConfig, SequenceModel, Trainer
from protomamba.model.heads import HyperspherePrototypes, SoftmaxHead, many
from protomamba.model.heads.base import Head
from protomamba.model.heads.prototypes import nearest_cosines


@pytest.fixture(params=["hpn", "fixed", "softmax"])
def head(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Head:
    monkeypatch.setattr(many, "BLOCK_SCORES", 70)  # blocks of a few classes
    config = ModelConfig(vocab_size=37, d_model=6, prototypes="fixed" if request.param == "fixed" else "learned")
    torch.manual_seed(0)
    return (SoftmaxHead if request.param == "softmax" else HyperspherePrototypes)(config).eval()


@pytest.mark.parametrize("targets", [1, 5, 71])
@pytest.mark.parametrize("k", [1, 4, 40])
def test_the_best_classes_and_the_sum_are_those_of_all_scores(head: Head, targets: int, k: int) -> None:
    z_TD = torch.randn(targets, 6, generator=torch.Generator().manual_seed(targets))
    found = head.best(z_TD, k, factor=3.0)
    assert found is not None
    scores_TV = head.scores(z_TD[None])[0]
    order = scores_TV.sort(dim=1, descending=True, stable=True)
    torch.testing.assert_close(found.values_Tk, order.values[:, :k])
    torch.testing.assert_close(found.log_sum_T, (3.0 * scores_TV).logsumexp(1))
    gathered = scores_TV.gather(1, found.classes_Tk)
    torch.testing.assert_close(gathered, found.values_Tk)
    assert all(len(set(row)) == len(row) for row in found.classes_Tk.tolist())


def test_of_equal_scores_the_first_class_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many, "BLOCK_SCORES", 3)
    scores = torch.tensor([[1.0, 3.0, 3.0, 0.0, 3.0, 2.0, 3.0]])
    found = many.judge(lambda a, b: scores[:, a:b], 1, 7, k=5)
    assert found.classes_Tk.tolist() == [[1, 2, 4, 6, 5]]


def test_evaluation_and_prediction_over_many_classes_are_those_over_few(
    head: Head, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(3)
    z_BLD, targets_BL = torch.randn(4, 9, 6, generator=generator), torch.randint(-1, 37, (4, 9), generator=generator)
    few, predicted = head.evaluate(z_BLD, targets_BL), head.predict(z_BLD)
    for module in ("base", "hypersphere", "softmax"):
        monkeypatch.setattr(f"protomamba.model.heads.{module}.MANY", 10)
    assert torch.equal(head.predict(z_BLD), predicted)
    found = head.evaluate(z_BLD, targets_BL)
    assert (found.correct, found.count) == (few.correct, few.count)
    assert few.log_likelihood_sum is not None
    assert found.log_likelihood_sum == pytest.approx(few.log_likelihood_sum, rel=1e-5)
    assert found.loss_sum == pytest.approx(few.loss_sum, rel=1e-5)


def test_the_loss_of_a_softmax_over_many_classes_is_that_of_the_judged_part(monkeypatch: pytest.MonkeyPatch) -> None:
    head, targets_T = SoftmaxHead(ModelConfig(vocab_size=37, d_model=6)).eval(), torch.arange(12)
    z_TD = torch.randn(12, 6)
    part = head.evaluate(z_TD[::4], targets_T[::4])
    for module in ("base", "softmax", "many"):
        monkeypatch.setattr(f"protomamba.model.heads.{module}.MANY", 10)
    monkeypatch.setattr(many, "JUDGED_SCORES", 37 * 3)
    found = head.evaluate(z_TD, targets_T, exact=False)
    assert (found.count, found.judgements) == (12, 3)
    assert found.loss_sum / 12 == pytest.approx(part.loss_sum / 3, rel=1e-5)


def test_a_part_is_judged_where_not_all_need_be(head: Head, monkeypatch: pytest.MonkeyPatch) -> None:
    assert many.judged_part(7, 1_000).tolist() == list(range(7))
    assert len(many.judged_part(2_048, 1_000_000)) == 134
    monkeypatch.setattr(many, "MANY", 10)
    monkeypatch.setattr(many, "JUDGED_SCORES", 37 * 3)
    z_TD, targets_T = torch.randn(12, 6), torch.arange(12)
    found = head.evaluate(z_TD, targets_T, exact=False)
    assert (found.count, found.judgements) == (12, 3)
    assert found.loss_sum == head.evaluate(z_TD, targets_T).loss_sum


def test_a_validation_judges_a_part_of_all_its_batches_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    model = SequenceModel(ModelConfig(vocab_size=37, d_model=6, n_layer=1), seed=0)
    generator = torch.Generator().manual_seed(0)
    batches = [tuple(torch.randint(37, (2, 9), generator=generator) for _ in range(2)) for _ in range(3)]
    batches[1][1][0] = -100
    trainer = Trainer(model)
    whole = trainer.evaluate(batches)
    for module in ("heads.base", "heads.many", "heads.hypersphere", "heads.softmax"):
        monkeypatch.setattr(f"protomamba.model.{module}.MANY", 10)
    monkeypatch.setattr("protomamba.train.validation.MANY", 10)
    passes: list[int] = []
    judge = model.head._judge
    monkeypatch.setattr(model.head, "_judge", lambda z, y: passes.append(len(y)) or judge(z, y))
    all_of_them = trainer.evaluate(batches, exact=False)
    assert passes == [45] and all_of_them.targets == whole.targets == 45
    for name in ("loss", "nll", "accuracy", "majority"):
        assert getattr(all_of_them, name) == pytest.approx(getattr(whole, name), rel=1e-5)
    monkeypatch.setattr(many, "JUDGED_SCORES", 37 * 7)
    part = trainer.evaluate(batches, calibrate=True, exact=False)
    assert passes[1:] == [7] and part.loss == pytest.approx(whole.loss, rel=1e-6)


def test_the_nearest_of_a_few_among_very_many_points(monkeypatch: pytest.MonkeyPatch) -> None:
    points = torch.randn(300, 5, generator=torch.Generator().manual_seed(0))
    expected = nearest_cosines(points, 3)
    monkeypatch.setattr("protomamba.model.heads.prototypes.MANY_TIMES", 1)
    monkeypatch.setattr("protomamba.model.heads.prototypes.BLOCK_COSINES", 21)
    torch.testing.assert_close(nearest_cosines(points, 3), expected)
