"""The losses whose products are asked for in bfloat16: against their twins, and that they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer, kernels
from protomamba.kernels import reference
from protomamba.kernels.closeness import TOLERANCES, rms_ratio

LOSSES = ("separated_prototype_loss", "softmax_loss", "sampled_softmax_loss")
T, D, V, S = 150, 48, 90, 60


def inputs(loss: str) -> tuple[list[Tensor], list[Tensor]]:
    """Tensors with a gradient, and those without."""
    targets_T = torch.randint(0, V, (T,))
    sample = [torch.randperm(V)[:S].sort().values, -2 * torch.rand(S)]
    leaves = [torch.randn(T, D), torch.randn(V, D)]
    if loss == "separated_prototype_loss":
        return [*leaves, torch.tensor(1.7)], [targets_T, *sample]
    return leaves, [targets_T, *(sample if loss == "sampled_softmax_loss" else [])]


def gradients(
    function: Callable[..., Tensor], leaves: list[Tensor], rest: list[Tensor], **options: Any
) -> list[Tensor]:
    """The loss, and the gradient of each leaf."""
    own = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    loss = function(*own, *rest, **options)
    return [loss.detach(), *torch.autograd.grad(loss, own)]


@pytest.mark.parametrize("name", LOSSES)
def test_close_to_the_twin_in_float64_and_really_in_bf16(level: str, name: str) -> None:
    torch.manual_seed(0)
    leaves, rest = inputs(name)
    exact = gradients(getattr(reference, name), [leaf.double() for leaf in leaves], rest)
    twin = gradients(getattr(reference, name), leaves, rest, precision="bf16")
    found = gradients(getattr(kernels, name), leaves, rest, precision="bf16")
    plain = gradients(getattr(kernels, name), leaves, rest)
    bound = TOLERANCES["block gradient", torch.bfloat16]
    assert all(x.dtype == torch.float32 for x in found)
    for one, other in ((found, exact), (twin, exact), (found, twin)):
        assert max(map(rms_ratio, one, other)) < bound
    assert max(map(rms_ratio, plain, exact)) < TOLERANCES["gradient", torch.float32]
    assert rms_ratio(found[1], exact[1]) > 20 * TOLERANCES["gradient", torch.float32]


@pytest.mark.parametrize("name", LOSSES)
def test_another_precision_is_refused(name: str) -> None:
    leaves, rest = inputs(name)
    with pytest.raises(ValueError, match="precision: expected 'fp32' or 'bf16', got 'int8'"):
        getattr(kernels, name)(*leaves, *rest, precision="int8")


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_a_trainer_in_bf16_has_its_head_in_bf16_and_judges_in_float32(head: str) -> None:
    model = SequenceModel(ModelConfig(vocab_size=40, d_model=16, n_layer=1, head=head), seed=0)
    z_BLD, targets_BL = torch.randn(2, 9, 16), torch.randint(0, 40, (2, 9))

    def gradient_of_z() -> Tensor:
        z = z_BLD.clone().requires_grad_()
        return torch.autograd.grad(model.head(z, targets_BL), z)[0]

    plain = gradient_of_z()
    Trainer(model, TrainConfig(precision="bf16"))
    off = rms_ratio(gradient_of_z(), plain)
    assert 20 * TOLERANCES["gradient", torch.float32] < off < TOLERANCES["block gradient", torch.bfloat16]
    model.eval()
    judged = model.head(z_BLD, targets_BL)
    model.precision = "fp32"
    assert torch.equal(model.head(z_BLD, targets_BL), judged)
