"""prototype_loss and softmax_loss against their twins in float64, on every path."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from protomamba.kernels import prototype_loss, reference, softmax_loss

from .compare import compare

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES = [prototype_loss, softmax_loss]
SHAPES = [(37, 20, 11), (1, 1, 1), (200, 33, 5), (64, 16, 300)]


def blocked(z_TD: Tensor, weight_VD: Tensor, targets_T: Tensor) -> Tensor:
    return softmax_loss(z_TD, weight_VD, targets_T, block=7)


def twin_of(loss: Loss) -> Loss:
    return reference.prototype_loss if loss is prototype_loss else reference.softmax_loss


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("loss", [*LOSSES, blocked], ids=lambda loss: loss.__name__)
def test_against_the_twin(level: str, loss: Loss, shape: tuple[int, int, int]) -> None:
    T, D, V = shape
    targets_T = torch.randint(-3, V, (T,))

    def op(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (loss(z, weight, targets_T),)

    def twin(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (twin_of(loss)(z, weight, targets_T),)

    compare(op, twin, {"z": torch.randn(T, D), "weight": torch.randn(V, D)})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_weights_make_it_a_weighted_mean(level: str, loss: Loss) -> None:
    targets_T, weight_T = torch.randint(-2, 7, (50,)), torch.rand(50)
    weight_T[::5] = 0.0

    def op(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return (loss(z, weight, targets_T, weight_T),)  # type: ignore[call-arg]

    def twin(z: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        each = torch.stack([twin_of(loss)(z[t : t + 1], weight, targets_T[t : t + 1]) for t in range(50)])
        kept_T = weight_T.double() * (targets_T >= 0)
        return ((each * kept_T).sum() / kept_T.sum(),)

    compare(op, twin, {"z": torch.randn(50, 8), "weight": torch.randn(7, 8)})


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_without_a_weight_above_0_the_loss_is_0(level: str, loss: Loss) -> None:
    z_TD = torch.randn(3, 4, requires_grad=True)
    value = loss(z_TD, torch.randn(5, 4), torch.tensor([0, 1, -1]), torch.zeros(3))  # type: ignore[call-arg]
    value.backward()
    assert value.item() == 0.0 and z_TD.grad is not None and not z_TD.grad.any()


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_without_a_target_the_loss_is_0_and_so_are_the_gradients(level: str, loss: Loss) -> None:
    z_TD, weight_VD = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    value = loss(z_TD, weight_VD, torch.tensor([-100, -1, -1, -100, -5]))
    dz_TD, dweight_VD = torch.autograd.grad(value, (z_TD, weight_VD))
    assert value.item() == 0.0
    assert torch.equal(dz_TD, torch.zeros(5, 4)) and torch.equal(dweight_VD, torch.zeros(3, 4))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_a_frozen_weight_gets_no_gradient(level: str, loss: Loss) -> None:
    z_TD, weight_VD = torch.randn(5, 4, requires_grad=True), torch.randn(3, 4)
    loss(z_TD, weight_VD, torch.tensor([0, 1, 2, -1, 1])).backward()
    assert z_TD.grad is not None and weight_VD.grad is None


def test_only_the_targets_prototypes_have_a_gradient(level: str) -> None:
    z_TD, prototypes_VD = torch.randn(6, 8), torch.randn(100, 8, requires_grad=True)
    targets_T = torch.tensor([3, 3, 97, -1, 40, 3])
    (gradient_VD,) = torch.autograd.grad(prototype_loss(z_TD, prototypes_VD, targets_T), prototypes_VD)
    assert gradient_VD.abs().sum(1).nonzero().flatten().tolist() == [3, 40, 97]


def test_length_of_z_and_prototypes_does_not_count(level: str) -> None:
    z_TD, prototypes_VD, targets_T = torch.randn(6, 8), torch.randn(5, 8), torch.tensor([0, 1, 2, 3, 4, 0])
    loss = prototype_loss(z_TD, prototypes_VD, targets_T)
    for scale in (1e-18, 1e18):
        torch.testing.assert_close(prototype_loss(z_TD * 1e-6, prototypes_VD * scale**0.5, targets_T), loss)


def test_a_vector_without_direction_has_cosine_0_and_no_gradient(level: str) -> None:
    z_TD = torch.zeros(2, 4)
    z_TD[1] = torch.randn(4)
    prototypes_VD = torch.randn(3, 4)
    prototypes_VD[2] = 0.0
    z_TD.requires_grad_()
    prototypes_VD.requires_grad_()
    loss = prototype_loss(z_TD, prototypes_VD, torch.tensor([0, 2]))
    dz_TD, dprototypes_VD = torch.autograd.grad(loss, (z_TD, prototypes_VD))
    assert loss.item() == 1.0
    assert dz_TD.abs().sum().item() == 0.0 and dprototypes_VD.abs().sum().item() == 0.0


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: loss.__name__)
def test_what_does_not_fit(level: str, loss: Loss) -> None:
    z_TD, weight_VD = torch.randn(2, 4), torch.randn(3, 4)
    with pytest.raises(ValueError, match=r"targets_T: expected values below V=3, got 3"):
        loss(z_TD, weight_VD, torch.tensor([0, 3]))
    with pytest.raises(ValueError, match=r"targets_T: expected shape \(T=2\), got \(3,\)"):
        loss(z_TD, weight_VD, torch.tensor([0, 1, 2]))
