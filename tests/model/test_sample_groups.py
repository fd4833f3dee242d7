"""Where a step has many targets, groups of them have samples of their own; and prototypes that are seldom seen."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig
from protomamba.kernels import sampled_softmax_loss, separated_prototype_loss
from protomamba.model.heads import sampling, sampling_head
from protomamba.model.heads.hypersphere import HyperspherePrototypes
from protomamba.model.heads.sampling_head import SamplingHead
from protomamba.model.heads.softmax import SoftmaxHead

CLASSES, WIDTH, SAMPLE, GROUP = 300, 8, 40, 16


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_head, "GROUP", GROUP)


def head_of(kind: type[SamplingHead], row_sparse: bool = False) -> SamplingHead:
    torch.manual_seed(0)
    config = ModelConfig(
        vocab_size=CLASSES, d_model=WIDTH, n_layer=1, head="hpn" if kind is HyperspherePrototypes else "softmax",
        head_options={"sample": SAMPLE},
    )  # fmt: skip
    head = kind(config)
    head.row_sparse = row_sparse
    return head


def batch(tokens: int) -> tuple[Tensor, Tensor]:
    targets_T = torch.randint(-60, CLASSES, (tokens,))
    return torch.randn(tokens, WIDTH), targets_T.clamp_min(-1)


def by_hand(head: SamplingHead, z_TD: Tensor, targets_T: Tensor, weight_T: Tensor | None) -> Tensor:
    """Each group's own mean, weighted by what its targets count."""
    samples = head.next_samples(targets_T)
    kept_T = targets_T >= 0
    z, targets = z_TD[kept_T], targets_T[kept_T]
    weight = torch.ones(len(targets)) if weight_T is None else weight_T[kept_T]
    size = -(-len(targets) // len(samples))
    total = torch.zeros(())
    for number, (sample_S, log_chance_S) in enumerate(samples):
        part = slice(number * size, (number + 1) * size)
        given = targets[part], sample_S, log_chance_S, weight[part]
        if isinstance(head, HyperspherePrototypes):
            loss = separated_prototype_loss(z[part], head.prototypes, head.log_scale, *given)
        else:
            assert isinstance(head, SoftmaxHead)
            loss = sampled_softmax_loss(z[part], head.weight, *given)
        total = total + loss * weight[part].sum()
    return total / weight.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("row_sparse", [False, True])
@pytest.mark.parametrize("tokens", [1, 15, 16, 19, 40, 90])
@pytest.mark.parametrize("kind", [HyperspherePrototypes, SoftmaxHead])
def test_the_loss_is_the_mean_over_groups(
    kind: type[SamplingHead], tokens: int, row_sparse: bool, weighted: bool
) -> None:
    head = head_of(kind, row_sparse)
    if weighted:
        head.set_class_weights(torch.rand(CLASSES))
    z_TD, targets_T = batch(tokens)
    targets_T[0] = 7
    z_TD.requires_grad_()
    leaves = [z_TD, *head.parameters()]
    state = {name: value.clone() for name, value in head.state_dict().items()}
    found = head(z_TD, targets_T)
    gradients = torch.autograd.grad(found, leaves)
    head.load_state_dict(state)
    expected = by_hand(head, z_TD, targets_T, head.target_weights(targets_T))
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-4, atol=1e-6)


def test_as_many_samples_as_groups_each_with_the_batch_s_classes_and_even_ones_of_its_own() -> None:
    head = head_of(HyperspherePrototypes)
    for targets, groups in ((1, 1), (16, 1), (17, 2), (64, 4), (65, 5)):
        targets_T = torch.arange(targets) % 9
        samples = [sample_S for sample_S, _ in head.next_samples(targets_T)]
        assert len(samples) == groups and all(len(sample_S) <= SAMPLE for sample_S in samples)
        assert all(bool(torch.isin(targets_T, sample_S).all()) for sample_S in samples)
        assert len({tuple(sample_S.tolist()) for sample_S in samples}) == groups
    assert head.next_samples(torch.full((40,), -1))[0][0].numel()  # no target at all: a step like any other


def test_a_class_s_steadiness_is_its_mean_gradient_over_the_root_mean_square() -> None:
    """Over many drawings of batch and samples, a class's gradient being 1 / q in each sample that has it."""
    share_V = torch.tensor([0.3, 0.1, 0.02, 0.004, *[0.576 / 60] * 60], dtype=torch.float64)
    drawing = sampling.Drawing(targets=24, kept=1.0, even=9, classes=64, groups=3)
    inverse_V = (-sampling.log_chances(share_V, drawing)).exp()
    generator, seen = torch.Generator().manual_seed(0), torch.zeros(6_000, 64, dtype=torch.float64)
    for row in seen:
        common = torch.multinomial(share_V, 24, replacement=True, generator=generator)
        for _ in range(3):
            own = torch.cat([common, torch.randint(64, (9,), generator=generator)]).unique()
            row[own] += inverse_V[own] / 3
    expected = seen.mean(0) / seen.square().mean(0).sqrt()
    found = sampling.steadiness(share_V, drawing)
    torch.testing.assert_close(found, expected, rtol=0.06, atol=0.0)
    one = drawing._replace(groups=1)
    torch.testing.assert_close(sampling.steadiness(share_V, one), sampling.log_chances(share_V, one).exp().sqrt())


def test_a_prototype_that_is_seldom_seen_is_kept_shorter() -> None:
    head = head_of(HyperspherePrototypes)
    assert isinstance(head, HyperspherePrototypes)
    head.set_frequencies(torch.arange(CLASSES) ** 2 + 1)
    head(*batch(50)).backward()
    head.post_step()
    steadiness_V = head.steadiness()
    assert steadiness_V is not None and float(steadiness_V[0]) < 0.3 < 0.5 < float(steadiness_V[-1])
    length_V = torch.linalg.vector_norm(head.prototypes.detach(), dim=1)
    torch.testing.assert_close(length_V, (steadiness_V * head.length()).float())


def test_few_targets_a_step_make_no_prototype_shorter_for_their_noise() -> None:
    head, share_V = head_of(HyperspherePrototypes), torch.full((CLASSES,), 1 / CLASSES, dtype=torch.float64)
    head.set_frequencies(torch.ones(CLASSES, dtype=torch.int64))
    for targets in (1, GROUP // 2, GROUP, 3 * GROUP):
        head.next_samples(torch.arange(targets) % CLASSES)
        assert head._drawn is not None and head._drawn.targets == targets
        steadiness_V = head.steadiness()
        assert steadiness_V is not None
        whole_V = sampling.steadiness(share_V, head._drawn)
        torch.testing.assert_close(steadiness_V, whole_V ** min(1.0, targets / GROUP))


def test_all_classes_and_rows_that_rest_between_touches_have_one_length() -> None:
    whole = HyperspherePrototypes(ModelConfig(vocab_size=30, d_model=WIDTH, n_layer=1))
    whole(torch.randn(9, WIDTH), torch.randint(30, (9,))).backward()
    assert whole.lengths() == whole.length() == pytest.approx(1.0)
    sparse = head_of(HyperspherePrototypes, row_sparse=True)
    assert isinstance(sparse, HyperspherePrototypes)
    sparse(*batch(20)).backward()
    rows_R = torch.tensor([3, 5])
    sparse.post_step(rows_R)
    torch.testing.assert_close(torch.linalg.vector_norm(sparse.prototypes.detach()[rows_R], dim=1), torch.ones(2))


def test_ranks_with_unlike_numbers_of_targets_keep_prototypes_at_the_same_lengths() -> None:
    one, other = head_of(HyperspherePrototypes), head_of(HyperspherePrototypes)
    targets_T = torch.arange(60)
    for head, part in ((one, targets_T[:50]), (other, targets_T[50:])):
        head.begin_step(17, targets_T)
        assert len(head.next_samples(part)) == -(-len(part) // GROUP)
    first, second = one.steadiness(), other.steadiness()
    assert first is not None and second is not None and torch.equal(first, second)
