"""What an op computes does not depend on torch's default dtype, on autocast, or on which input is the narrower one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer, generate, kernels
from protomamba.kernels import reference
from protomamba.kernels.native import Library

from .closeness import assert_close


def small(**fields: object) -> SequenceModel:
    return SequenceModel(ModelConfig(vocab_size=20, d_model=24, d_state=8, n_layer=2, **fields), seed=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_another_default_dtype_changes_no_bit(level: str, head: str, dtype: torch.dtype) -> None:
    tokens_BL = torch.randint(20, (2, 9))

    def run() -> tuple[list[Tensor], list[list[int]]]:
        trainer = Trainer(small(head=head), TrainConfig(bp_cadence_steps=1, grad_clip_norm=1e-3))
        trainer.train_step(tokens_BL, tokens_BL)
        return [p.detach() for p in trainer.model.parameters()], generate(trainer.model, [[1, 2]])

    expected = run()
    model_made_in_float32 = small(head=head)
    torch.set_default_dtype(dtype)
    try:
        trainer = Trainer(model_made_in_float32, TrainConfig(bp_cadence_steps=1, grad_clip_norm=1e-3))
        trainer.train_step(tokens_BL, tokens_BL)
        found = [p.detach() for p in trainer.model.parameters()], generate(trainer.model, [[1, 2]])
    finally:
        torch.set_default_dtype(torch.float32)
    assert found[1] == expected[1]
    assert all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))


@pytest.mark.parametrize("backend", ["torch", "onednn"])
def test_autocast_changes_no_bit(level: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels.matmul, "backend", lambda: backend)
    tokens_BL = torch.randint(20, (2, 9))
    gradients = []
    for enabled in (False, True):
        model = small()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            z_BLD, _ = model.features(tokens_BL)
        z_BLD.square().sum().backward()
        gradients.append(model.layers[0].mixer.out_proj.weight.grad)
    if level != "reference":
        assert torch.equal(*gradients)


def test_a_scan_with_a_narrow_u_keeps_its_other_inputs_wide(level: str) -> None:
    u, delta = torch.randn(2, 200, 8).bfloat16(), 0.005 * torch.rand(2, 200, 8)
    rest = -torch.rand(8, 4), torch.randn(2, 200, 4), torch.randn(2, 200, 4)
    y, last = kernels.selective_scan(u, delta, *rest, return_last_state=True)
    exact = reference.selective_scan(u.double(), delta.double(), *(x.double() for x in rest), return_last_state=True)
    assert y.dtype == torch.bfloat16
    assert_close({"last": last}, {"last": exact[1]}, "forward", torch.float32)


def test_softmax_loss_takes_a_head_wider_than_the_features(level: str) -> None:
    z_TD, weight_VD, targets_T = torch.randn(5, 8).bfloat16(), torch.randn(7, 8), torch.tensor([0, 6, -1, 2, 3])
    found = kernels.softmax_loss(z_TD, weight_VD, targets_T)
    expected = reference.softmax_loss(z_TD.double(), weight_VD.double(), targets_T)
    assert_close({"loss": found}, {"loss": expected}, "forward", torch.float32)


def test_gradients_of_two_inputs_are_two_tensors(level: str) -> None:
    x_BLD, residual_BLD = (torch.randn(1, 3, 8, requires_grad=True) for _ in range(2))
    normed, _ = kernels.add_rms_norm(x_BLD, residual_BLD, torch.ones(8))
    normed.square().sum().backward()
    assert x_BLD.grad is not None and residual_BLD.grad is not None
    assert x_BLD.grad.data_ptr() != residual_BLD.grad.data_ptr()


@pytest.mark.parametrize("which", ["exp", "exp2", "sigmoid", "softplus"])
def test_any_nan_stays_one(library: Library, which: str) -> None:
    payloads = torch.tensor([0x7FC00000, 0x7FC00001, 0x7FFFFFFF, -1, -4194304], dtype=torch.int32).view(torch.float32)
    assert library.map(which, payloads).isnan().all()
