"""Heads: exact gradients, blocks equal the whole, prototypes that stay or stay apart, a scale that is found again."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from protomamba.config import ModelConfig
from protomamba.errors import ConfigError
from protomamba.kernels import native
from protomamba.model.heads import HEADS, HyperspherePrototypes, SoftmaxHead, prototypes
from protomamba.model.heads import base as head_module
from protomamba.model.heads import hypersphere as heads
from protomamba.model.heads.base import Evaluation, Head


@pytest.fixture(autouse=True)
def quick_placement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prototypes, "POLISH_PASSES", 3)


def config(classes: int = 37, width: int = 8, **fields: Any) -> ModelConfig:
    return ModelConfig(vocab_size=classes, d_model=width, **fields)


def batch(classes: int = 37, width: int = 8, rows: int = 5, length: int = 7) -> tuple[Tensor, Tensor]:
    """z (B, L, D) and targets (B, L), about a quarter of them ignored."""
    generator = torch.Generator().manual_seed(3)
    z_BLD = torch.randn(rows, length, width, generator=generator)
    targets_BL = torch.randint(classes, (rows, length), generator=generator)
    targets_BL[torch.rand(rows, length, generator=generator) < 0.25] = -100
    return z_BLD, targets_BL


def plain_hpn_loss(z_BLD: Tensor, prototypes_VD: Tensor, targets_BL: Tensor) -> Tensor:
    kept = targets_BL >= 0
    return (1 - F.cosine_similarity(z_BLD[kept], prototypes_VD[targets_BL[kept]], dim=-1)).square().mean()


def plain_softmax_loss(z_BLD: Tensor, weight_VD: Tensor, targets_BL: Tensor) -> Tensor:
    return F.cross_entropy((z_BLD @ weight_VD.t()).flatten(0, -2), targets_BL.flatten(), ignore_index=-100)


class Tensors(TorchDispatchMode):
    """Records the size of the largest tensor any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(item, Tensor):
                self.largest = max(self.largest, item.numel())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["hpn", "softmax"])
def test_loss_and_gradients_are_those_of_the_formula(name: str, dtype: torch.dtype) -> None:
    head = HEADS[name](config(separation=0.0)).to(dtype)
    (weight,) = head.parameters()
    z_BLD, targets_BL = batch()
    z_BLD = z_BLD.to(dtype).requires_grad_()
    plain = {"hpn": plain_hpn_loss, "softmax": plain_softmax_loss}[name](z_BLD, weight, targets_BL)
    expected = torch.autograd.grad(plain, [z_BLD, weight])
    loss = head(z_BLD, targets_BL)
    found = torch.autograd.grad(loss, [z_BLD, weight])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert abs(float(loss.detach() - plain.detach())) < tolerance * max(1.0, float(plain.detach()))
    for one, other in zip(found, expected, strict=True):
        assert (one - other).abs().max() < tolerance * other.abs().max().clamp_min(1e-3)


def with_prototypes(head: HyperspherePrototypes, prototypes_VD: Tensor) -> None:
    """Put a tensor of autograd's in the place of the parameter, and start the drawing anew."""
    head._parameters.pop("prototypes", None)
    head.prototypes = prototypes_VD
    head.draws.zero_()


@pytest.mark.parametrize("sample", [20, 64])
def test_the_separation_term_has_the_gradient_of_its_value(sample: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HyperspherePrototypes, "SAMPLE", sample)
    head = HyperspherePrototypes(config()).double()
    z_BLD, targets_BL = batch()
    kept = targets_BL >= 0

    def term(z_TD: Tensor, prototypes_VD: Tensor) -> Tensor:
        with_prototypes(head, prototypes_VD)
        return head.crowding(z_TD, targets_BL[kept])

    start_VD = torch.randn(37, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert torch.autograd.gradcheck(term, (z_BLD[kept].double().requires_grad_(), start_VD.requires_grad_()))


def test_the_loss_is_the_documented_one_and_its_gradient_has_the_term_too() -> None:
    head = HyperspherePrototypes(config(separation=3.0)).double()
    z_BLD, targets_BL = batch()
    z_BLD = z_BLD.double().requires_grad_()
    kept = targets_BL >= 0
    plain = plain_hpn_loss(z_BLD, head.prototypes, targets_BL)
    expected = torch.autograd.grad(plain + 3.0 * head.crowding(z_BLD[kept], targets_BL[kept]), [z_BLD, head.prototypes])
    loss = head(z_BLD, targets_BL)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    for found, wanted in zip(torch.autograd.grad(loss, [z_BLD, head.prototypes]), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-14)
    found = head.evaluate(z_BLD, targets_BL)
    assert found.loss_sum / found.count == pytest.approx(float(plain.detach()), rel=1e-12)
    with torch.no_grad():
        assert float(head(z_BLD, targets_BL)) == pytest.approx(float(plain.detach()), rel=1e-12)


def test_all_classes_in_the_sample_give_the_plain_soft_hinge() -> None:
    head = HyperspherePrototypes(config()).double()
    z_BLD, targets_BL = batch()
    z_TD, targets_T = z_BLD[targets_BL >= 0].double(), targets_BL[targets_BL >= 0]
    cosine_TV = head.scores(z_TD)
    hinge_T = F.cross_entropy(head.SHARPNESS * cosine_TV, targets_T, reduction="none") / head.SHARPNESS
    assert torch.allclose(head.crowding(z_TD, targets_T), hinge_T.mean(), rtol=1e-12)


def test_a_sample_estimates_the_sum_over_all_wrong_classes_without_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HyperspherePrototypes, "SAMPLE", 12)
    head = HyperspherePrototypes(config())
    targets_T = torch.cat([torch.zeros(30, dtype=torch.long), torch.arange(10)])
    estimate_V = torch.zeros(37)
    draws = 10_000
    for _ in range(draws):
        sample_S, log_chance_S = head._sample(targets_T)
        estimate_V[sample_S] += (-log_chance_S).exp() / draws
    assert (estimate_V - 1).abs().max() < 0.08
    assert abs(float(estimate_V.mean()) - 1) < 0.01
    assert int(head.draws) == draws


@pytest.mark.parametrize("name", sorted(HEADS))
@pytest.mark.parametrize("block", [1, 2 * 37, 3 * 37 + 5, 10**6])
def test_blocks_equal_the_whole(name: str, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "BLOCK_SCORES", block)
    head = HEADS[name](config(separation=0.0))
    z_BLD, targets_BL = batch()
    kept = targets_BL >= 0
    with torch.no_grad():
        scores_BLV, logits_BLV, loss = head.scores(z_BLD), head.logits(z_BLD), head(z_BLD, targets_BL)
    assert scores_BLV.shape == (5, 7, 37) and logits_BLV is not None
    assert torch.equal(head.predict(z_BLD), scores_BLV.argmax(-1))
    found = head.evaluate(z_BLD, targets_BL)
    assert found.count == int(kept.sum())
    assert found.correct == int((scores_BLV.argmax(-1) == targets_BL)[kept].sum())
    assert found.loss_sum == pytest.approx(float(loss) * found.count, rel=1e-5)
    likelihood = -F.cross_entropy(logits_BLV[kept], targets_BL[kept], reduction="sum")
    assert found.log_likelihood_sum == pytest.approx(float(likelihood), rel=1e-5)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_a_class_per_row_works_as_a_class_per_token(name: str) -> None:
    head = HEADS[name](config(separation=0.0))
    z_BLD, targets_BL = batch()
    assert torch.equal(head.predict(z_BLD[:, 2]), head.predict(z_BLD)[:, 2])
    assert head(z_BLD[:, 2], targets_BL[:, 2]).ndim == 0
    assert torch.allclose(head(z_BLD[:, 2], targets_BL[:, 2]), head(z_BLD[:, 2:3], targets_BL[:, 2:3]))


@pytest.mark.parametrize("name", sorted(HEADS))
def test_ignored_targets_count_for_nothing(name: str) -> None:
    head = HEADS[name](config())
    z_BLD, targets_BL = batch()
    other_BLD = torch.where((targets_BL < 0)[..., None], 100 * z_BLD, z_BLD)
    assert torch.equal(head.eval()(z_BLD, targets_BL), head(other_BLD, targets_BL))
    none_BL = torch.full_like(targets_BL, -100)
    z_BLD.requires_grad_()
    loss = head(z_BLD, none_BL)
    loss.backward()
    assert float(loss.detach()) == 0.0 and z_BLD.grad is not None and not z_BLD.grad.any()
    assert head.evaluate(z_BLD, none_BL) == Evaluation(0.0, 0, 0, 0.0)


def train(head: Head, steps: int, lr: float = 0.05) -> Tensor:
    """Train z and the head together on random targets, as a model would: the collapse in its purest form."""
    z_BLD, targets_BL = batch(rows=8, length=32)
    z_BLD.requires_grad_()
    optimizer = torch.optim.AdamW([z_BLD, *head.parameters()], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        head(z_BLD, targets_BL).backward()
        optimizer.step()
        head.post_step()
    return z_BLD.detach()


def test_fixed_prototypes_never_move() -> None:
    head = HyperspherePrototypes(config(prototypes="fixed"))
    before = head.prototypes.clone()
    assert not list(head.parameters()) and "prototypes" in head.state_dict()
    train(head, 5)
    assert torch.equal(before, head.prototypes)


def test_learned_prototypes_move_and_keep_their_length() -> None:
    head = HyperspherePrototypes(config())
    before = head.prototypes.detach().clone()
    train(head, 5)
    assert not torch.allclose(before, head.prototypes)
    assert (head.prototypes.detach().norm(dim=1) - 1).abs().max() < 1e-6


def test_health_tells_a_collapse_from_a_placement() -> None:
    head = HyperspherePrototypes(config())
    assert head.diagnostics()["nearest_cosine"] < 0.5
    with torch.no_grad():
        noise = 0.05 * torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
        head.prototypes.copy_(F.normalize(torch.ones(8) + noise, dim=1))
    assert head.diagnostics()["nearest_cosine"] > 0.9


def test_separation_prevents_the_collapse_that_comes_without_it() -> None:
    """A model too small to tell all classes apart: the loss alone pulls their prototypes together instead."""

    def trained(separation: float) -> tuple[float, float, float]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 8)
        head = HyperspherePrototypes(config(separation=separation))
        targets_T = torch.arange(256) % 37
        x = 2 * torch.randn(37, 4)[targets_T] + torch.randn(256, 4)
        optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=0.02)
        for _ in range(400):
            optimizer.zero_grad()
            loss = head(model(x), targets_T)
            loss.backward()
            optimizer.step()
            head.post_step()
        return float(loss.detach()), head.evaluate(model(x), targets_T).accuracy, head.diagnostics()["nearest_cosine"]

    loss, accuracy, cosine = trained(0.0)
    assert loss < 0.001 and accuracy < 0.45 and cosine > 0.95
    loss, accuracy, cosine = trained(10.0)
    assert loss > 0.01 and accuracy > 0.55 and cosine < 0.9


def test_the_sample_depends_on_the_state_alone() -> None:
    head = HyperspherePrototypes(config(classes=1000, separation=1.0))
    with torch.no_grad():
        head.prototypes.add_(0.3 * torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)))
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in head.state_dict().items()}

    z_TD, targets_T = torch.randn(50, 8), torch.arange(50)

    def drawn() -> float:
        return float(head.crowding(z_TD, targets_T).detach())

    first = drawn()
    assert drawn() != first
    head.load_state_dict(state)
    torch.rand(3)
    assert drawn() == first
    torch.set_rng_state(before)


@pytest.mark.parametrize("true_scale", [0.5, 4.0, 11.0, 60.0])
def test_fit_finds_the_scale_that_made_the_targets(true_scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "BLOCK_SCORES", 37 * 500)
    monkeypatch.setattr(heads, "FIT_TARGETS", 40_000)
    head = HyperspherePrototypes(config())
    generator = torch.Generator().manual_seed(1)
    z_TD = torch.randn(40_000, 8, generator=generator)
    with torch.no_grad():
        probability_TV = (true_scale * head.scores(z_TD)).softmax(-1)
    targets_T = torch.multinomial(probability_TV, 1, generator=generator)[:, 0]
    targets_T[::10] = -100
    head.calibrate((z, y) for z, y in zip(z_TD.split(7_000), targets_T.split(7_000), strict=True))
    assert float(head.scale) == pytest.approx(true_scale, rel=0.03 if true_scale > 1 else 0.15)
    assert "scale" in head.state_dict()


def test_fit_survives_what_has_no_finite_answer() -> None:
    head = HyperspherePrototypes(config())
    start = float(head.scale)
    z_TD = head.prototypes.detach().clone()
    head.calibrate([])
    head.calibrate([(z_TD, torch.full((37,), -100))])
    head.calibrate([(z_TD * math.nan, torch.arange(37))])
    assert float(head.scale) == start
    head.calibrate([(z_TD, torch.arange(37))])
    assert start < float(head.scale) <= 1e5, "every target hit: the likelihood grows without end, the scale does not"
    head.calibrate([(-z_TD, torch.arange(37))])
    assert 0 < float(head.scale) < start


def test_nothing_of_tokens_by_classes_or_classes_squared_in_a_training_step() -> None:
    classes, width, tokens = 9_000, 8, 600
    z_BLD, targets_BL = batch(classes, width, 6, 100)
    for kind in ("fixed", "learned"):
        head = HyperspherePrototypes(config(classes, width, prototypes=kind))
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3) if kind == "learned" else None
        with Tensors() as seen:
            head(z_BLD.requires_grad_(), targets_BL).backward()
            if optimizer:
                optimizer.step()
            head.post_step()
        assert 0 < seen.largest <= max(classes * width, tokens * HyperspherePrototypes.SAMPLE)
        assert seen.largest < min(classes * classes, tokens * classes) / 10


@pytest.mark.parametrize("name", sorted(HEADS))
def test_validation_keeps_to_its_blocks(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_module, "BLOCK_SCORES", 50_000)
    head = HEADS[name](config(3_000)).eval()
    z_BLD, targets_BL = batch(3_000, 8, 6, 100)
    with Tensors() as seen:
        head.predict(z_BLD)
        head.calibrate([(z_BLD, targets_BL)])
        if name == "hpn":
            head.evaluate(z_BLD, targets_BL)
    assert seen.largest <= 50_000


def test_tying_shares_the_matrix_or_says_why_not() -> None:
    embedding = torch.nn.Embedding(37, 8)
    head = SoftmaxHead(config())
    head.tie_weights(embedding.weight)
    assert head.weight is embedding.weight
    with pytest.raises(ConfigError, match="the embedding has 37 rows, the head 5 classes"):
        SoftmaxHead(config(n_class=5)).tie_weights(embedding.weight)
    with pytest.raises(ConfigError, match="HyperspherePrototypes cannot share"):
        HyperspherePrototypes(config()).tie_weights(embedding.weight)


def test_classes_of_their_own_and_a_single_class() -> None:
    assert HyperspherePrototypes(config(n_class=10)).prototypes.shape == (10, 8)
    for name in HEADS:
        head = HEADS[name](config(n_class=1))
        z_BLD, targets_BL = batch(1)
        head(z_BLD, targets_BL).backward()
        assert not head.predict(z_BLD).any()
        assert head.evaluate(z_BLD, targets_BL).log_likelihood_sum == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", sorted(HEADS))
def test_gradients_have_the_same_bits_each_time_on_two_threads(name: str) -> None:
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(False)
    head = HEADS[name](config(classes=300, width=64))
    z_BLD, targets_BL = batch(rows=16, length=256, classes=300, width=64)

    def gradient() -> Tensor:
        head.zero_grad()
        if isinstance(head, HyperspherePrototypes):
            head.draws.zero_()
        head(z_BLD, targets_BL).backward()
        (weight,) = head.parameters()
        assert weight.grad is not None
        return weight.grad.clone()

    native.set_kernels("reference")
    try:
        first = gradient()
        assert all(torch.equal(gradient(), first) for _ in range(20))
    finally:
        native.set_kernels("auto")


def test_scores_follow_prototypes_that_change() -> None:
    head, (z_BLD, _) = HyperspherePrototypes(config()), batch()
    with torch.no_grad():
        first = head.scores(z_BLD)
        assert torch.equal(head.scores(z_BLD), first)
        head.prototypes[0].neg_()
        changed = head.scores(z_BLD)
    torch.testing.assert_close(changed[..., 0], -first[..., 0])
    head.load_state_dict({**head.state_dict(), "prototypes": -head.prototypes.detach()})
    with torch.no_grad():
        torch.testing.assert_close(head.scores(z_BLD), -changed)


def test_scores_follow_prototypes_that_change_unnoticed() -> None:
    head = HyperspherePrototypes(config())
    z_BLD, _ = batch()
    with torch.no_grad():
        before = head.scores(z_BLD)
        head.prototypes.data.copy_(torch.randn_like(head.prototypes))  # does not count as a change for autograd
        assert not torch.equal(head.scores(z_BLD), before)
