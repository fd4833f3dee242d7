"""separated_prototype_loss against its twin in float64, on every path."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from protomamba.kernels import prototype_loss, reference, separated_prototype_loss

from .compare import compare

# T, D, V, S: fewer classes than a sample, all of them in it, a few; more tokens than are taken at a time.
SHAPES = [(37, 20, 11, 11), (1, 1, 2, 1), (200, 33, 50, 16), (64, 16, 300, 31)]


def drawn(T: int, V: int, S: int) -> tuple[Tensor, Tensor, Tensor]:
    """Targets (some ignored), a sorted sample without repetition, and the logs of chances."""
    return torch.randint(-3, V, (T,)), torch.randperm(V)[:S].sort().values, -torch.rand(S)


@pytest.mark.parametrize("block", [7, 1_024])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_against_the_twin(
    level: str, shape: tuple[int, int, int, int], block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = importlib.import_module("protomamba.kernels.separated_prototype_loss")  # whose name the op hides
    monkeypatch.setattr(module, "BLOCK", block)
    T, D, V, S = shape
    rest = drawn(T, V, S)

    def op(z: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
        return (separated_prototype_loss(z, prototypes, *rest, sharpness=20.0, weight=3.0),)

    def twin(z: Tensor, prototypes: Tensor) -> tuple[Tensor, ...]:
        return (reference.separated_prototype_loss(z, prototypes, *rest, sharpness=20.0, weight=3.0),)

    compare(op, twin, {"z": torch.randn(T, D), "prototypes": torch.randn(V, D)})


def test_its_value_is_the_prototype_loss(level: str) -> None:
    targets_T, sample_S, log_chance_S = drawn(40, 30, 9)
    z_TD, prototypes_VD = torch.randn(40, 8), torch.randn(30, 8)
    loss = separated_prototype_loss(z_TD, prototypes_VD, targets_T, sample_S, log_chance_S, sharpness=20.0, weight=3.0)
    torch.testing.assert_close(loss, prototype_loss(z_TD, prototypes_VD, targets_T), rtol=1e-6, atol=0)


def test_without_a_target_there_is_no_gradient(level: str) -> None:
    _, sample_S, log_chance_S = drawn(5, 30, 9)
    z_TD, prototypes_VD = torch.randn(5, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    targets_T = torch.tensor([-1, -100, -1, -1, -1])
    loss = separated_prototype_loss(z_TD, prototypes_VD, targets_T, sample_S, log_chance_S, sharpness=20.0, weight=3.0)
    dz_TD, dprototypes_VD = torch.autograd.grad(loss, (z_TD, prototypes_VD))
    assert loss == 0 and not dz_TD.any() and not dprototypes_VD.any()


def test_vectors_without_direction_take_and_give_nothing(level: str) -> None:
    targets_T, sample_S = torch.tensor([0, 1, 2]), torch.tensor([1, 2, 3])
    z_TD, prototypes_VD = torch.randn(3, 8), torch.randn(4, 8)
    z_TD[0], prototypes_VD[2] = 0.0, 0.0
    z_TD.requires_grad_(), prototypes_VD.requires_grad_()
    loss = separated_prototype_loss(
        z_TD, prototypes_VD, targets_T, sample_S, torch.zeros(3), sharpness=20.0, weight=3.0
    )
    dz_TD, dprototypes_VD = torch.autograd.grad(loss, (z_TD, prototypes_VD))
    assert not dz_TD[0].any() and not dprototypes_VD[2].any()
    assert dz_TD.isfinite().all() and dprototypes_VD.isfinite().all() and dz_TD[1:].any(1).all()


@pytest.mark.parametrize("frozen", ["z", "prototypes"])
def test_what_is_frozen_gets_no_gradient(level: str, frozen: str) -> None:
    tensors = {"z": torch.randn(6, 8), "prototypes": torch.randn(30, 8)}
    for name, tensor in tensors.items():
        tensor.requires_grad_(name != frozen)
    loss = separated_prototype_loss(*tensors.values(), *drawn(6, 30, 9), sharpness=20.0, weight=3.0)
    loss.backward()
    assert all((tensor.grad is None) == (name == frozen) for name, tensor in tensors.items())


def test_a_target_of_too_high_a_class_is_refused(level: str) -> None:
    rest = torch.tensor([3]), torch.tensor([0]), torch.zeros(1)
    with pytest.raises(ValueError, match="expected values below V=3, got 3"):
        separated_prototype_loss(torch.randn(1, 2), torch.randn(3, 2), *rest, sharpness=20.0, weight=1.0)
