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
from protomamba.model.heads import HEADS, HyperspherePrototypes, SoftmaxHead, prototypes, sampling_head
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


def learnt(head: HyperspherePrototypes) -> list[Tensor]:
    return [head.prototypes, head.log_scale]


@pytest.mark.parametrize("sample", [20, 64])
def test_the_loss_is_the_documented_one_and_its_gradient_that_of_the_cross_entropy(sample: int) -> None:
    head = HyperspherePrototypes(config(head_options={"sample": sample})).double()
    z_BLD, targets_BL = batch()
    z_BLD = z_BLD.double().requires_grad_()
    kept = targets_BL >= 0
    plain = plain_hpn_loss(z_BLD, head.prototypes, targets_BL)
    samples = head.next_samples(z_BLD, targets_BL)
    assert len(samples) == (sample != 64)
    expected = torch.autograd.grad(head.cross_entropy(z_BLD[kept], targets_BL[kept], *samples), [z_BLD, *learnt(head)])
    head.draws.zero_(), head.counts.zero_(), head.counted.zero_()
    loss = head(z_BLD, targets_BL)
    assert float(loss.detach()) == pytest.approx(float(plain.detach()), rel=1e-12)
    for found, wanted in zip(torch.autograd.grad(loss, [z_BLD, *learnt(head)]), expected, strict=True):
        assert torch.allclose(found, wanted, rtol=1e-9, atol=1e-14)
    found = head.evaluate(z_BLD, targets_BL)
    assert found.loss_sum / found.count == pytest.approx(float(plain.detach()), rel=1e-12)
    with torch.no_grad():
        assert float(head(z_BLD, targets_BL)) == pytest.approx(float(plain.detach()), rel=1e-12)


@pytest.mark.parametrize("told", [False, True])
def test_chances_of_candidates_follow_the_frequencies_told_or_counted(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling_head, "CANDIDATES", 12)  # and the sample has all of them
    head = HyperspherePrototypes(config(head_options={"sample": 12}))
    head.set_frequencies(torch.arange(1, 38))
    head.told.fill_(told)
    for _ in range(3):
        targets_BL = torch.tensor([[3, 5], [3, 7]])
        found = head.next_samples(torch.randn(2, 2, 8), targets_BL)
        ((sample_S, log_chance_RS, tokens_R),) = found
        assert tokens_R == (2, 2) and len(sample_S) <= 12 and bool((sample_S.diff() > 0).all())
        share_S = (head.counts[sample_S] + 0.5) / (head.counted + 0.5 * 37)
        missed_S = (1 - share_S.double()) ** 2 * (1 - 1 / 37) ** 6
        for own, found_S in zip(([3, 5], [3, 7]), log_chance_RS, strict=True):
            certain_S = torch.isin(sample_S, torch.tensor(own))
            expected_S = torch.log(1 - missed_S).masked_fill(certain_S, 0.0).float()
            torch.testing.assert_close(found_S, expected_S)
    assert int(head.counts[3]) == (4 if told else 10)


def test_frequencies_are_counted_until_the_source_tells_them() -> None:
    head = HyperspherePrototypes(config(head_options={"sample": 12}))
    targets_T = torch.tensor([3, 3, -100, 36])
    head(torch.randn(4, 8), targets_T).backward()
    assert head.counts.nonzero()[:, 0].tolist() == [3, 36] and int(head.counts[3]) == 2 and int(head.counted) == 3
    head.set_frequencies(torch.arange(37))
    head(torch.randn(4, 8), targets_T).backward()
    assert torch.equal(head.counts, torch.arange(37)) and int(head.counted) == 36 * 37 // 2
    assert {"counts", "counted", "told"} <= set(head.state_dict())
    for wrong in (torch.arange(36), torch.zeros(37, dtype=torch.long), -torch.arange(37)):
        with pytest.raises(ValueError, match="expected 37 counts >= 0, not all of them 0"):
            head.set_frequencies(wrong)


def test_ranks_that_are_given_the_step_s_targets_count_alike_and_draw_by_its_key() -> None:
    one, other = (HyperspherePrototypes(config(classes=500, head_options={"sample": 64})) for _ in range(2))
    targets_T, z_TD = torch.randint(-5, 30, (200,), generator=torch.Generator().manual_seed(0)), torch.randn(200, 8)

    def drawn(head: HyperspherePrototypes, key: int | None, part: slice) -> Tensor:
        if key is not None:
            head.begin_step(key, targets_T)
        return head.next_samples(z_TD[part], targets_T[part])[0].classes_S

    first, second = slice(100), slice(100, 200)
    samples_S = drawn(one, 17, first)
    drawn(other, 17, second)
    assert torch.equal(one.counts, other.counts) and int(one.counted) == int((targets_T >= 0).sum())
    assert torch.equal(samples_S, drawn(other, 17, first)) and not torch.equal(samples_S, drawn(one, 18, first))
    one.begin_step(19, targets_T)
    with torch.no_grad():  # a pass that draws nothing leaves no key behind either
        one(z_TD[first], targets_T[first])
    ((expected_S, *_),) = one.draw(int(one.draws), z_TD[first], targets_T[first])
    assert torch.equal(drawn(one, None, first), expected_S)


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
    assert (head.prototypes.detach().norm(dim=1) - head.length()).abs().max() < 1e-6


def test_health_tells_a_collapse_from_a_placement() -> None:
    head = HyperspherePrototypes(config())
    assert head.diagnostics()["nearest_cosine"] < 0.5
    with torch.no_grad():
        noise = 0.05 * torch.randn(37, 8, generator=torch.Generator().manual_seed(0))
        head.prototypes.copy_(F.normalize(torch.ones(8) + noise, dim=1))
    assert head.diagnostics()["nearest_cosine"] > 0.9


def test_the_cross_entropy_prevents_the_collapse_that_comes_without_it() -> None:
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
    loss, accuracy, cosine = trained(20.0)
    assert loss > 0.01 and accuracy > 0.55 and cosine < 0.9


@pytest.mark.parametrize(("classes", "sample"), [(16, 1_024), (300, 64)])
def test_uniform_targets_leave_prototypes_apart(classes: int, sample: int) -> None:
    """With nothing to learn 0.1's gradient pulled all prototypes to one place: nearest cosine 0.93 at 16 classes."""
    torch.manual_seed(0)
    head = HyperspherePrototypes(config(classes=classes, width=16, head_options={"sample": sample}))
    model = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 16))
    optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], lr=3e-3)
    for _ in range(800):
        optimizer.zero_grad()
        head(model(torch.randn(256, 8)), torch.randint(classes, (256,))).backward()
        optimizer.step()
        head.post_step()
    health = head.diagnostics()
    assert health["nearest_cosine"] < health["random_cosine"] + 0.1
    targets_T = torch.randint(classes, (4_096,))
    found = head.evaluate(model(torch.randn(4_096, 8)), targets_T)
    assert found.log_likelihood_sum is not None
    assert -found.log_likelihood_sum / found.count < math.log(classes) + 0.05


def test_the_sample_depends_on_the_state_alone() -> None:
    head = HyperspherePrototypes(config(classes=1000, head_options={"sample": 100}))
    z_TD = torch.randn(50, 8)
    before, state = torch.get_rng_state(), {k: v.clone() for k, v in head.state_dict().items()}

    def drawn() -> list[int]:
        ((sample_S, *_),) = head.next_samples(z_TD, torch.arange(50))
        return sample_S.tolist()

    first = drawn()
    assert drawn() != first
    head.load_state_dict(state)
    torch.rand(3)
    assert drawn() == first
    torch.set_rng_state(before)


def test_weights_of_0_1_start_the_sharpness_at_their_fitted_scale() -> None:
    head = HyperspherePrototypes(config())
    since = ("log_scale", "fitted", "counts", "counted", "told")
    old = {name: value for name, value in head.state_dict().items() if name not in since}
    head.load_state_dict({**old, "scale": torch.tensor(31.0)})
    assert float(head.log_scale.detach().exp()) == pytest.approx(31.0)
    assert float(head.scale) == 31.0 and bool(head.fitted)
    (note,) = head.notes
    assert "log_scale starts at log 31, the fitted scale" in note
    again = HyperspherePrototypes(config())
    again.load_state_dict(head.state_dict())
    assert not again.notes


def test_until_it_is_fitted_the_scale_follows_the_learnt_sharpness() -> None:
    head = HyperspherePrototypes(config())
    train(head, 5)
    learnt_s = float(head.log_scale.detach().exp())
    assert float(head.scale) == pytest.approx(learnt_s) and learnt_s != HyperspherePrototypes(config()).scale
    z_BLD, targets_BL = batch()
    head.calibrate([(z_BLD, targets_BL)])
    fitted = float(head.scale)
    train(head, 5)
    assert float(head.scale) == fitted and float(head.log_scale.detach().exp()) != learnt_s


@pytest.mark.parametrize("name", sorted(HEADS))
def test_class_weights_weigh_training_and_nothing_else(name: str) -> None:
    z_BLD, targets_BL = batch()
    head = HEADS[name](config(separation=0.0)).double()
    z_BLD = z_BLD.double()
    plain = head.evaluate(z_BLD, targets_BL)
    weight_V = torch.rand(37, generator=torch.Generator().manual_seed(0))
    head.set_class_weights(weight_V)
    z_TD, targets_T = z_BLD[targets_BL >= 0], targets_BL[targets_BL >= 0]
    with torch.no_grad():
        each_T = torch.stack([head.eval()(z_D, y) for z_D, y in zip(z_TD.split(1), targets_T.split(1), strict=True)])
        weighted = head.train()(z_BLD, targets_BL)
    count_T = weight_V[targets_T].double()
    assert float(weighted) == pytest.approx(float((each_T * count_T).sum() / count_T.sum()), rel=1e-9)
    assert head.weight_of(targets_BL) == pytest.approx(float(count_T.sum()))
    assert head.evaluate(z_BLD, targets_BL) == plain and head.training
    fresh = HEADS[name](config(separation=0.0))
    fresh.load_state_dict(head.state_dict())
    assert fresh.class_weights is not None and torch.equal(fresh.class_weights, weight_V)


def test_class_weights_weigh_the_cross_entropy_s_gradient() -> None:
    """A weight of 2 is the target twice, of 0 not at all."""
    z_BLD, targets_BL = batch(classes=3)
    head = HyperspherePrototypes(config(classes=3)).double()
    z_BLD = z_BLD.double()
    twice = targets_BL.where(targets_BL == 1, -100)
    doubled = torch.autograd.grad(
        head(torch.cat([z_BLD, z_BLD]), torch.cat([targets_BL.where(targets_BL > 0, -100), twice])), learnt(head)
    )
    head.set_class_weights(torch.tensor([0.0, 2.0, 1.0]))
    for found, expected in zip(torch.autograd.grad(head(z_BLD, targets_BL), learnt(head)), doubled, strict=True):
        assert torch.allclose(found, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("wrong", [torch.ones(5), torch.zeros(37), -torch.ones(37), torch.full((37,), math.nan)])
def test_class_weights_that_cannot_be(wrong: Tensor) -> None:
    with pytest.raises(ConfigError, match="class weights: expected 37 finite numbers >= 0, not all of them 0"):
        SoftmaxHead(config()).set_class_weights(wrong)


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
        head = HyperspherePrototypes(config(classes, width, prototypes=kind, head_options={"sample": 512}))
        optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3) if kind == "learned" else None
        with Tensors() as seen:
            head(z_BLD.requires_grad_(), targets_BL).backward()
            if optimizer:
                optimizer.step()
            head.post_step()
        assert 0 < seen.largest <= max(classes * width, tokens * head.sample)
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
        weight = head.prototypes if isinstance(head, HyperspherePrototypes) else next(head.parameters())
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
