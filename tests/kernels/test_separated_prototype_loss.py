"""separated_prototype_loss against its twin in float64, on every path."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from protomamba.kernels import (
    Sample,
    grouped_prototype_loss,
    native,
    prototype_loss,
    reference,
    separated_prototype_loss,
)

from .closeness import assert_close
from .compare import compare

# T, D, V, S: fewer classes than a sample, all of them in it, a few; more tokens than are taken at a time. S None: all.
SHAPES = [(37, 20, 11, 11), (1, 1, 2, 1), (200, 33, 50, 16), (64, 16, 300, 31), (50, 20, 37, None), (3, 130, 257, None)]
ONE = torch.tensor([1])
Rest = tuple[Tensor, Tensor | None, Tensor | None]


def drawn(T: int, V: int, S: int | None) -> Rest:
    """Targets (some ignored), a sorted sample without repetition, and the logs of chances."""
    targets_T = torch.randint(-3, V, (T,))
    return (
        (targets_T, None, None) if S is None else (targets_T, torch.randperm(V)[:S].sort().values, -3 * torch.rand(S))
    )


def inputs(T: int, D: int, V: int) -> dict[str, Tensor]:
    return {"z": torch.randn(T, D), "prototypes": torch.randn(V, D), "log_scale": torch.tensor(1.7)}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [7, 1_024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_twin(
    level: str, shape: tuple[int, int, int, int | None], block: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[separated_prototype_loss.__module__], "BLOCK", block)
    T, D, V, S = shape
    rest = drawn(T, V, S)
    weight_T = torch.rand(T) if weighted else None

    def op(**x: Tensor) -> tuple[Tensor, ...]:
        return (separated_prototype_loss(*x.values(), *rest, weight_T),)

    def twin(**x: Tensor) -> tuple[Tensor, ...]:
        return (reference.separated_prototype_loss(*x.values(), *rest, weight_T),)

    compare(op, twin, inputs(T, D, V))


def samples_of(V: int, sizes: tuple[int, ...], tokens: int) -> list[Sample]:
    """For unlike parts of the tokens, each in one to three runs; some have none."""
    ends = sorted(torch.randint(tokens + 1, (len(sizes) - 1,)).tolist())
    return [one_of(V, S, end - start) for S, start, end in zip(sizes, [0, *ends], [*ends, tokens], strict=True)]


def one_of(V: int, S: int, tokens: int) -> Sample:
    tokens_R = (tokens // 3, tokens - tokens // 3, 0)[: 1 + S % 3] if S % 3 else (tokens,)
    return Sample(torch.randperm(V)[:S].sort().values, -3 * torch.rand(len(tokens_R), S), tokens_R)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("block", [7, 1_024])
@pytest.mark.parametrize(("T", "sizes"), [(90, (16, 9, 21)), (91, (30, 1)), (5, (4, 4, 4, 4)), (60, (12,))], ids=str)
def test_groups_against_their_twin(
    level: str, T: int, sizes: tuple[int, ...], block: int, weighted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one alone, and groups without a token."""
    monkeypatch.setattr(sys.modules[separated_prototype_loss.__module__], "BLOCK", block)
    targets_T, weight_T = torch.randint(-3, 40, (T,)), torch.rand(T) if weighted else None
    targets_T[0] = 5
    samples = samples_of(40, sizes, int((targets_T >= 0).sum()))
    compare(
        lambda **x: (grouped_prototype_loss(*x.values(), targets_T, samples, weight_T),),
        lambda **x: (reference.grouped_prototype_loss(*x.values(), targets_T, samples, weight_T),),
        inputs(T, 20, 40),
    )


def test_one_group_is_the_loss_of_one_sample(level: str) -> None:
    targets_T, sample_S, log_chance_S = drawn(40, 30, 11)
    assert sample_S is not None and log_chance_S is not None
    found, tokens = [], int((targets_T >= 0).sum())
    for op in (
        lambda *x: separated_prototype_loss(*x, targets_T, sample_S, log_chance_S),
        lambda *x: grouped_prototype_loss(*x, targets_T, [Sample(sample_S, log_chance_S[None], (tokens,))]),
    ):
        torch.manual_seed(3)
        given = [x.requires_grad_() for x in inputs(40, 16, 30).values()]
        loss = op(*given)
        found.append([loss, *torch.autograd.grad(loss, given)])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize(
    ("samples", "told"),
    [([], "expected at least one"), ([Sample(ONE, torch.zeros(1, 1), (8,))], "9 tokens, got for 8"),
     ([Sample(torch.tensor([2, 1]), torch.zeros(1, 2), (9,))], "in rising order"),
     ([Sample(ONE, torch.zeros(2, 1), (9,))], "expected 1 rows, got 2"),
     ([Sample(ONE, torch.zeros(2, 2), (4, 5))], "expected shape")],
)  # fmt: skip
def test_groups_that_do_not_fit_are_refused(samples: list[Sample], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        grouped_prototype_loss(*inputs(9, 4, 5).values(), torch.zeros(9, dtype=torch.int64), samples)


@pytest.mark.parametrize("log_scale", [-3.0, 0.0, 3.0, 5.0])
def test_at_any_sharpness(level: str, log_scale: float) -> None:
    """From logits that hardly differ to a softmax that is one class, where all but the shape of the float is lost."""
    rest = drawn(60, 40, 21)
    given = {**inputs(60, 16, 40), "log_scale": torch.tensor(log_scale)}
    compare(
        lambda **x: (separated_prototype_loss(*x.values(), *rest),),
        lambda **x: (reference.separated_prototype_loss(*x.values(), *rest),),
        given,
    )


@pytest.mark.parametrize("seed", range(25))
def test_odd_sizes(level: str, seed: int) -> None:
    """Sizes by lot, with and without a sample, own classes in it, out of it, or alone in it."""
    generator = torch.Generator().manual_seed(seed)
    T, D, V = (int(torch.randint(1, limit, (), generator=generator)) for limit in (70, 50, 90))
    S = int(torch.randint(1, V + 1, (), generator=generator)) if seed % 3 else None
    rest = drawn(T, V, S)
    compare(
        lambda **x: (separated_prototype_loss(*x.values(), *rest),),
        lambda **x: (reference.separated_prototype_loss(*x.values(), *rest),),
        inputs(T, D, V),
    )


def test_the_gradient_of_the_twin_is_that_of_the_cross_entropy() -> None:
    targets_T, sample_S, log_chance_S = (
        torch.tensor([1, 0, 2, 6, 5]),
        torch.tensor([0, 2, 3, 5]),
        -torch.rand(4).double(),
    )
    given = [x.double().requires_grad_() for x in (torch.randn(5, 4), torch.randn(7, 4), torch.tensor(0.4))]
    for sample in ((sample_S, log_chance_S), (None, None)):

        def term(*x: Tensor, sample: tuple[Tensor | None, ...] = sample) -> Tensor:
            return reference.sampled_cross_entropy(*x, targets_T, *sample)

        assert torch.autograd.gradcheck(term, given)
        found = torch.autograd.grad(reference.separated_prototype_loss(*given, targets_T, *sample), given)
        assert_close(
            dict(enumerate(found)), dict(enumerate(torch.autograd.grad(term(*given), given))), "forward", torch.float64
        )


def test_all_classes_are_the_plain_cross_entropy_over_cosines() -> None:
    z_TD, prototypes_VD, targets_T = torch.randn(30, 8).double(), torch.randn(11, 8).double(), torch.randint(11, (30,))
    logits_TV = 5.0 * reference.unit(z_TD) @ reference.unit(prototypes_VD).t()
    found = reference.sampled_cross_entropy(z_TD, prototypes_VD, torch.tensor(5.0).double().log(), targets_T)
    torch.testing.assert_close(found, torch.nn.functional.cross_entropy(logits_TV, targets_T))


def test_its_value_is_the_prototype_loss(level: str) -> None:
    targets_T, sample_S, log_chance_S = drawn(40, 30, 9)
    z_TD, prototypes_VD, log_scale = inputs(40, 8, 30).values()
    loss = separated_prototype_loss(z_TD, prototypes_VD, log_scale, targets_T, sample_S, log_chance_S)
    torch.testing.assert_close(loss, prototype_loss(z_TD, prototypes_VD, targets_T), rtol=1e-6, atol=0)


def test_without_a_target_there_is_no_gradient(level: str) -> None:
    _, sample_S, log_chance_S = drawn(5, 30, 9)
    given = [x.requires_grad_() for x in inputs(5, 8, 30).values()]
    targets_T = torch.tensor([-1, -100, -1, -1, -1])
    loss = separated_prototype_loss(*given, targets_T, sample_S, log_chance_S)
    assert loss == 0 and not any(gradient.any() for gradient in torch.autograd.grad(loss, given))


def test_vectors_without_direction_take_and_give_nothing(level: str) -> None:
    targets_T, sample_S = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    z_TD, prototypes_VD, log_scale = inputs(3, 8, 4).values()
    z_TD[0], prototypes_VD[2] = 0.0, 0.0
    z_TD.requires_grad_(), prototypes_VD.requires_grad_()
    loss = separated_prototype_loss(z_TD, prototypes_VD, log_scale, targets_T, sample_S, torch.zeros(3))
    dz_TD, dprototypes_VD = torch.autograd.grad(loss, (z_TD, prototypes_VD))
    assert not dz_TD[0].any() and not dprototypes_VD[2].any()
    assert dz_TD.isfinite().all() and dprototypes_VD.isfinite().all() and dz_TD[1:].any(1).all()


@pytest.mark.parametrize("frozen", ["z", "prototypes", "log_scale"])
def test_what_is_frozen_gets_no_gradient(level: str, frozen: str) -> None:
    tensors = inputs(6, 8, 30)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    separated_prototype_loss(*tensors.values(), *drawn(6, 30, 9)).backward()
    assert all((tensor.grad is None) == (name == frozen) for name, tensor in tensors.items())


def test_a_target_of_too_high_a_class_is_refused(level: str) -> None:
    rest = torch.tensor([3]), torch.tensor([0]), torch.zeros(1)
    with pytest.raises(ValueError, match="expected values below V=3, got 3"):
        separated_prototype_loss(torch.randn(1, 2), torch.randn(3, 2), torch.tensor(1.0), *rest)


@pytest.mark.parametrize("sampled", [False, True])
def test_the_same_bits_at_1_2_and_4_threads(library: native.Library, sampled: bool) -> None:
    given = [x.requires_grad_() for x in inputs(1_501, 70, 90).values()]
    rest = drawn(1_501, 90, 41 if sampled else None)
    results = []
    for threads in (1, 2, 4, 2):
        torch.set_num_threads(threads)
        loss = separated_prototype_loss(*given, *rest)
        results.append([loss, *torch.autograd.grad(loss, given)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
