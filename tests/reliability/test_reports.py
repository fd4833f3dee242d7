"""Faults that users of other projects reported in public, tried on ours; docs/reliability.md lists where all 32 are."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from protomamba import kernels
from protomamba.config import ModelConfig, TrainConfig
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.trainer import Trainer


def model(**more: object) -> SequenceModel:
    return SequenceModel(ModelConfig(vocab_size=13, d_model=16, n_layer=2, **more), seed=3)  # type: ignore[arg-type]


def test_the_time_steps_and_decays_start_as_published() -> None:
    """fla-org/flash-linear-attention#739: softplus(dt_bias) log-uniform in [0.001, 0.1], A = -1 .. -N."""
    wide = SequenceModel(ModelConfig(vocab_size=13, d_model=512, n_layer=1), seed=3)
    named = dict(wide.named_parameters())
    (bias,) = (p for name, p in named.items() if name.endswith("dt_proj.bias"))
    steps = nn.functional.softplus(bias.detach().double())
    assert 0.0009 < steps.min() < 0.002 and 0.06 < steps.max() < 0.11
    assert abs(steps.log10().mean() + 2) < 0.1, "the middle of [-3, -1]"
    (A_log,) = (p for name, p in named.items() if name.endswith("A_log"))
    assert torch.allclose(A_log.detach().exp(), torch.arange(1.0, 17).expand_as(A_log))


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 127, 129, 255, 256, 257, 300])
def test_gradients_are_finite_and_the_twins_at_every_length(length: int) -> None:
    """state-spaces/mamba#352: NaN gradients where the length was no multiple of 256."""
    torch.manual_seed(length)
    shapes = {"u": (1, length, 8), "delta": (1, length, 8), "A": (8, 4), "B": (1, length, 4), "C": (1, length, 4)}
    given = {name: torch.randn(shape) for name, shape in shapes.items()}
    given["A"] = -given["A"].abs() - 0.1
    ours = [x.clone().requires_grad_() for x in given.values()]
    twins = [x.double().requires_grad_() for x in given.values()]
    kernels.selective_scan(*ours, delta_softplus=True).square().sum().backward()
    kernels.reference.selective_scan(*twins, delta_softplus=True).square().sum().backward()
    for mine, twin in zip(ours, twins, strict=True):
        assert mine.grad is not None and twin.grad is not None and mine.grad.isfinite().all()
        assert (mine.grad - twin.grad).abs().max() <= 1e-4 * (1 + twin.grad.abs().max())


def test_a_batch_without_a_target_changes_no_weight_to_nan() -> None:
    """karpathy/nanochat#603: the mean over no target is NaN, and went into every weight."""
    trainer = Trainer(model(), TrainConfig(lr=1e-2, bp_cadence_steps=1))
    tokens = torch.randint(0, 13, (2, 9))
    trainer.train_step(tokens, tokens)
    trainer.train_step(tokens, torch.full_like(tokens, -100))
    stats = trainer.train_step(tokens, tokens)
    assert torch.isfinite(torch.tensor(stats.loss))
    assert all(parameter.isfinite().all() for parameter in trainer.model.parameters())


def test_loaded_bits_are_the_saved_ones(tmp_path: pytest.TempPathFactory) -> None:
    """fla-org/flash-linear-attention#754: a constructor's initialisation ran after the weights were loaded."""
    from pathlib import Path

    trainer = Trainer(model(), TrainConfig(lr=1e-2, bp_cadence_steps=1))
    tokens = torch.randint(0, 13, (2, 9))
    for _ in range(3):
        trainer.train_step(tokens, tokens)
    path = Path(str(tmp_path), "c.safetensors")
    trainer.save_checkpoint(path)
    again = Trainer.load_checkpoint(path)
    for (name, one), (other, two) in zip(
        trainer.model.state_dict().items(), again.model.state_dict().items(), strict=True
    ):
        assert name == other and torch.equal(one, two), name
