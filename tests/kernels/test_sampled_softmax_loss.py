"""sampled_softmax_loss against its twin, against the full softmax, and how far off a sample is."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig
from protomamba.kernels import reference, sampled_softmax_loss, softmax_loss
from protomamba.model.heads import SoftmaxHead

from .compare import compare


@pytest.mark.parametrize("block", [7, 1_024])
@pytest.mark.parametrize(("T", "D", "V", "S"), [(37, 20, 11, 11), (1, 1, 2, 1), (90, 33, 50, 16), (64, 16, 300, 31)])
def test_against_the_twin(T: int, D: int, V: int, S: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[sampled_softmax_loss.__module__], "BLOCK", block)
    rest = torch.randint(-3, V, (T,)), torch.randperm(V)[:S].sort().values, -3 * torch.rand(S), torch.rand(T)
    compare(
        lambda **x: (sampled_softmax_loss(*x.values(), *rest),),
        lambda **x: (reference.sampled_softmax_loss(*x.values(), *rest),),
        {"z": torch.randn(T, D), "weight": torch.randn(V, D)},
    )


def test_a_sample_of_all_classes_is_the_full_softmax() -> None:
    z_TD, weight_VD = (torch.randn(n, 7, dtype=torch.float64, requires_grad=True) for n in (40, 23))
    targets_T = torch.randint(-2, 23, (40,))
    full = softmax_loss(z_TD, weight_VD, targets_T)
    sampled = sampled_softmax_loss(z_TD, weight_VD, targets_T, torch.arange(23), torch.zeros(23))
    assert float(sampled.detach()) == pytest.approx(float(full.detach()), rel=1e-12)
    for found, wanted in zip(*(torch.autograd.grad(x, [z_TD, weight_VD]) for x in (sampled, full)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-13)


def test_the_twin_s_gradient_is_that_of_its_value() -> None:
    given = torch.randint(-1, 9, (12,)), torch.tensor([0, 3, 7]), -torch.rand(3, dtype=torch.float64)
    tensors = [torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (12, 9)]
    assert torch.autograd.gradcheck(lambda z, w: reference.sampled_softmax_loss(z, w, *given), tensors)


@pytest.mark.parametrize("weighted", [False, True])
def test_very_unlikely_targets_keep_their_loss(weighted: bool) -> None:
    """40 nats: 1 - p_own is 1 in float32, and the loss must not come from it."""
    z_TD, weight_VD = torch.tensor([[20.0]]), torch.tensor([[1.0], [-1.0], [0.0]])
    given = torch.tensor([1]), torch.tensor([0, 2]), torch.zeros(2), torch.tensor([3.0]) if weighted else None
    assert float(sampled_softmax_loss(z_TD, weight_VD, *given)) == pytest.approx(40.0, rel=1e-6)


def head_of(sample: int) -> SoftmaxHead:
    torch.manual_seed(0)
    return SoftmaxHead(ModelConfig(vocab_size=50, d_model=6, head="softmax", head_options={"sample": sample}))


def test_the_bias_falls_with_the_sample() -> None:
    """Of the loss: the logarithm of an unbiased estimate is too small in the mean, the less the more classes it has."""
    share_V = 1.0 / torch.arange(1, 51, dtype=torch.float64)
    z_TD, biases = 2 * torch.randn(16, 6, generator=torch.Generator().manual_seed(1)), []
    for sample in (4, 12, 36):
        head, generator = head_of(sample), torch.Generator().manual_seed(2)
        head.set_frequencies((1e6 * share_V).long())
        with torch.no_grad():
            head.weight.mul_(2)
        found = []
        for _ in range(200):
            targets_T = torch.multinomial(share_V, 16, replacement=True, generator=generator)
            sampled = float(head(z_TD, targets_T).detach())
            found.append(sampled - head.eval().evaluate(z_TD, targets_T).loss_sum / 16)
            head.train()
        biases.append(abs(sum(found) / len(found)))
    assert biases[0] > 1.5 * biases[1] and biases[1] > 1.5 * biases[2] and biases[2] < 0.1


def test_a_step_touches_the_sample_and_the_targets_and_evaluation_all() -> None:
    head, targets_T, z_TD = head_of(8), torch.tensor([4, 4, -100, 31]), torch.randn(4, 6)
    head(z_TD, targets_T).backward()
    assert isinstance(head.weight.grad, Tensor)
    touched = head.weight.grad.abs().sum(1).nonzero()[:, 0].tolist()
    assert len(touched) <= 10 and {4, 31} <= set(touched)
    assert {"draws", "counts", "counted", "told"} <= set(head.state_dict())
    full = head_of(0)
    assert set(full.state_dict()) == {"weight"}
    assert head.evaluate(z_TD, targets_T).loss_sum == full.evaluate(z_TD, targets_T).loss_sum
