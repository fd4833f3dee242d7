"""Where a step has many targets, groups of them have samples of their own; and prototypes that are seldom seen."""

from __future__ import annotations

import itertools
import math

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


def batch(rows: int, length: int = 1) -> tuple[Tensor, Tensor]:
    targets_BL = torch.randint(-60, CLASSES, (rows, length))
    return torch.randn(rows, length, WIDTH), targets_BL.clamp_min(-1)


def by_hand(head: SamplingHead, z_BLD: Tensor, targets_BL: Tensor, weight_T: Tensor | None) -> Tensor:
    """Each run's own mean, weighted by what its targets count."""
    samples = head.next_samples(z_BLD, targets_BL)
    z_TD, targets_T = z_BLD.reshape(-1, WIDTH), targets_BL.reshape(-1)
    kept_T = targets_T >= 0
    z, targets = z_TD[kept_T], targets_T[kept_T]
    weight = torch.ones(len(targets)) if weight_T is None else weight_T.reshape(-1)[kept_T]
    total, start = torch.zeros(()), 0
    for sample in samples:
        for tokens, log_chance_S in zip(sample.tokens_R, sample.log_chance_RS, strict=True):
            part = slice(start, start + tokens)
            start += tokens
            given = targets[part], sample.classes_S, log_chance_S, weight[part]
            if isinstance(head, HyperspherePrototypes):
                loss = separated_prototype_loss(z[part], head.prototypes, head.log_scale, *given)
            else:
                assert isinstance(head, SoftmaxHead)
                loss = sampled_softmax_loss(z[part], head.weight, *given)
            total = total + loss * weight[part].sum()
    assert start == len(targets)
    return total / weight.sum()


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("row_sparse", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1), (15, 1), (16, 1), (19, 1), (40, 1), (1, 50), (5, 9), (3, 40), (30, 3)], ids=str
)
@pytest.mark.parametrize("kind", [HyperspherePrototypes, SoftmaxHead])
def test_the_loss_is_the_mean_over_groups(
    kind: type[SamplingHead], shape: tuple[int, int], row_sparse: bool, weighted: bool
) -> None:
    head = head_of(kind, row_sparse)
    if weighted:
        head.set_class_weights(torch.rand(CLASSES))
    z_BLD, targets_BL = batch(*shape)
    targets_BL[0] = 7
    z_BLD.requires_grad_()
    leaves = [z_BLD, *head.parameters()]
    state = {name: value.clone() for name, value in head.state_dict().items()}
    found = head(z_BLD, targets_BL)
    gradients = torch.autograd.grad(found, leaves)
    head.load_state_dict(state)
    expected = by_hand(head, z_BLD, targets_BL, head.target_weights(targets_BL.reshape(-1)))
    torch.testing.assert_close(found, expected)
    for one, other in zip(gradients, torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(one.to_dense(), other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("candidates", [CLASSES, 100])
def test_as_many_samples_as_groups_each_drawn_for_itself(candidates: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling_head, "CANDIDATES", candidates)
    head = head_of(HyperspherePrototypes)
    for targets, groups in ((1, 1), (16, 1), (17, 2), (64, 4), (65, 5)):
        z_TD, targets_T = torch.randn(targets, WIDTH), torch.arange(targets) % 9
        samples = [sample.classes_S for sample in head.next_samples(z_TD, targets_T)]
        assert len(samples) == groups and all(SAMPLE - 1 <= len(sample_S) <= SAMPLE for sample_S in samples)
        assert all(bool((sample_S.diff() > 0).all()) for sample_S in samples)
        assert len({tuple(sample_S.tolist()) for sample_S in samples}) == groups
    nothing = head.next_samples(torch.randn(40, WIDTH), torch.full((40,), -1))
    assert nothing[0].classes_S.numel()  # no target at all: a step like any other


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 0.0, 1e30])
@pytest.mark.parametrize("where", ["z", "table"])
def test_a_sample_is_drawn_whatever_the_numbers_are(where: str, value: float) -> None:
    """So that a step that is to be skipped is skipped, and not an error."""
    head, (z_BLD, targets_BL) = head_of(HyperspherePrototypes), batch(20)
    with torch.no_grad():
        (z_BLD[3] if where == "z" else head.table[7]).fill_(value)
    for sample in head.next_samples(z_BLD, targets_BL):
        assert len(sample.classes_S) and bool(sample.log_chance_RS.isfinite().all())


def test_a_class_s_steadiness_is_its_mean_gradient_over_the_root_mean_square() -> None:
    """Over many drawings of batch and samples, a class's gradient being 1 / q in each sample that has it."""
    share_V = torch.tensor([0.3, 0.1, 0.02, 0.004, *[0.576 / 60] * 60], dtype=torch.float64)
    drawing = sampling.Drawing(targets=24, kept=1.0, even=9, classes=64, groups=3)
    missed_V = (1 - share_V) ** 24 * (1 - 1 / 64) ** 9
    inverse_V = 1 / (1 - missed_V)
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
    torch.testing.assert_close(sampling.steadiness(share_V, one), (1 - missed_V).sqrt())


@pytest.mark.parametrize(
    ("tokens_B", "expected"),
    [
        ([8, 8, 8], [[8, 8], [8]]),
        ([], [[0]]),
        ([0, 0], [[0]]),
        ([0, 3, 0, 9, 0], [[3, 9]]),
        ([16, 1], [[16], [1]]),
        ([17], [[9], [8]]),
        ([3, 50, 4], [[14], [14], [14], [11], [4]]),
        ([1] * 20, [[4, 4, 4, 4], [4]]),
    ],
    ids=str,
)
def test_groups_are_runs_of_whole_rows(tokens_B: list[int], expected: list[list[int]]) -> None:
    groups = sampling.groups_of(tokens_B, limit=16, most_runs=4)
    assert [[run.tokens for run in group] for group in groups] == expected
    rows = [run.rows for group in groups for run in group]
    for run in (run for group in groups for run in group):
        inside = sum(tokens_B[run.rows.start : run.rows.stop])
        assert run.tokens == inside or run.tokens < 16 < inside  # a part of one long row
    assert all(a == b or a.stop == b.start for a, b in itertools.pairwise(rows))


@pytest.mark.parametrize("candidates", [60, 40])
@pytest.mark.parametrize(("length", "rows"), [(1, 24), (6, 4), (24, 1), (8, 12)])
def test_given_a_run_s_rows_the_sum_over_wrong_classes_is_estimated_without_bias(
    length: int, rows: int, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What decides a token's features is its own row; over what is drawn beside it: other rows, candidates, lots."""
    monkeypatch.setattr(sampling_head, "CANDIDATES", candidates)
    torch.manual_seed(0)
    head = HyperspherePrototypes(ModelConfig(vocab_size=60, d_model=WIDTH, head_options={"sample": 20}))
    share_V = 1.0 / torch.arange(2, 62, dtype=torch.float64)
    share_V /= share_V.sum()
    head.set_frequencies((1e7 * share_V).long())
    first_L, first_LD = torch.randint(20, 60, (length,)), torch.randn(length, WIDTH)
    others, draws = (rows - 1) * length, 800
    weights_NV = torch.zeros(draws, 60, dtype=torch.float64)
    for key in range(draws):
        drawn_T = torch.multinomial(share_V, others, replacement=True) if others else torch.empty(0, dtype=torch.int64)
        targets_BL = torch.cat([first_L, drawn_T]).reshape(rows, length)
        z_BLD = torch.cat([first_LD, torch.randn(others, WIDTH)]).reshape(rows, length, WIDTH)
        found = head.draw(key, z_BLD, targets_BL)[0]
        weights_NV[key, found.classes_S] = (-found.log_chance_RS[0].double()).exp()
    off_V, noise_V = (weights_NV.mean(0) - 1).abs(), weights_NV.std(0) / math.sqrt(draws)
    # With too many classes for the candidates, how many are kept depends on the batch, which the formula leaves out.
    assert bool((off_V < 4.5 * noise_V + (0.1 if candidates < 60 else 0.02)).all()), off_V


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
        head.next_samples(torch.randn(targets, WIDTH), torch.arange(targets) % CLASSES)
        assert head._drawn is not None and head._drawn.targets == targets
        steadiness_V = head.steadiness()
        assert steadiness_V is not None
        whole_V = sampling.steadiness(share_V, head._drawn)
        torch.testing.assert_close(steadiness_V, whole_V ** min(1.0, targets / GROUP))


def test_all_classes_and_rows_that_rest_between_touches_have_one_length() -> None:
    whole = HyperspherePrototypes(ModelConfig(vocab_size=30, d_model=WIDTH, n_layer=1))
    whole(torch.randn(9, WIDTH), torch.randint(30, (9,))).backward()
    whole.post_step()
    assert whole.length() == pytest.approx(1.0)
    torch.testing.assert_close(torch.linalg.vector_norm(whole.prototypes.detach(), dim=1), torch.ones(30))
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
        samples = head.next_samples(torch.randn(len(part), WIDTH), part)
        assert len(samples) == -(-len(part) // GROUP)
    first, second = one.steadiness(), other.steadiness()
    assert first is not None and second is not None and torch.equal(first, second)
