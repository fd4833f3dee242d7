"""Parameter groups by one rule, the schedule as a function of the step, moments by name."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from protomamba import ModelConfig, SequenceModel, TrainConfig
from protomamba.kernels import square_sums
from protomamba.train.optim import Optimizer, decays, first_non_finite, learning_rate, make_optimizer, total_norm


def adamw(model: torch.nn.Module, **settings: Any) -> Optimizer:
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return make_optimizer(named, TrainConfig(**settings))


DECAYED = {
    "embedding.weight",
    "layers.0.mixer.conv1d.weight",
    "layers.0.mixer.x_proj.weight",
    "layers.0.mixer.dt_proj.weight",
    "layers.0.mixer.out_proj.weight",
    "layers.0.mixer.in_proj.weight",
}
NOT_DECAYED = {
    "layers.0.norm.weight",
    "layers.0.mixer.A_log",
    "layers.0.mixer.D",
    "layers.0.mixer.conv1d.bias",
    "layers.0.mixer.dt_proj.bias",
    "norm_f.weight",
    "head.log_scale",
    "head.prototypes",
}


def test_every_parameter_is_in_its_group() -> None:
    model = SequenceModel(ModelConfig(vocab_size=9, d_model=8, n_layer=1))
    groups = {name: decays(name, p) for name, p in model.named_parameters()}
    assert {n for n, decayed in groups.items() if decayed} == DECAYED
    assert {n for n, decayed in groups.items() if not decayed} == NOT_DECAYED


def test_the_schedule_at_its_corners() -> None:
    config = TrainConfig(lr=1.0, lr_warmup_steps=4, lr_min_scale=0.1)
    rates = [learning_rate(step, 10, config) for step in range(10)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0 and rates[9] == pytest.approx(0.1)
    assert all(a >= b for a, b in pairwise(rates[3:]))
    assert learning_rate(25, 10, config) == pytest.approx(0.1)
    assert learning_rate(0, 1, TrainConfig(lr=1.0)) == 1.0
    assert learning_rate(2, 3, TrainConfig(lr=1.0, lr_warmup_steps=50)) == 1.0


def test_an_update_is_adamw_with_the_clipped_gradient() -> None:
    weight = torch.nn.Linear(3, 2, bias=False)
    start, gradient = weight.weight.detach().clone(), torch.tensor([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]])
    optimizer = adamw(weight, weight_decay=0.1)
    weight.weight.grad = gradient.clone()
    optimizer.step(lr=0.1, scale=0.25)
    expected = start * (1 - 0.1 * 0.1) - 0.1 * (gradient / 4) / ((gradient / 4).abs() + 1e-8)
    torch.testing.assert_close(weight.weight.detach(), expected)
    moments = optimizer.state()["weight"]
    torch.testing.assert_close(moments["exp_avg"], 0.1 * gradient / 4)


def test_nothing_to_train_is_allowed() -> None:
    frozen = torch.nn.Linear(2, 2).requires_grad_(False)
    optimizer = adamw(frozen)
    optimizer.step(0.1)
    assert optimizer.state() == {} and total_norm([]) == 0.0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_first_non_finite_tensor_is_named(bad: float) -> None:
    tensors = {"a": torch.ones(3), "b": torch.tensor([1.0, bad]), "c": torch.tensor([bad])}
    assert first_non_finite(tensors) == "b"
    assert first_non_finite({"a": torch.ones(3)}) is None and first_non_finite({}) is None
    assert not math.isfinite(total_norm(square_sums(list(tensors.values()))))


def test_large_finite_values_are_not_mistaken_for_infinity() -> None:
    assert first_non_finite({"a": torch.full((1000,), 3e38)}) is None


def test_moments_of_another_shape_are_refused() -> None:
    small, large = (adamw(SequenceModel(ModelConfig(vocab_size=5, d_model=8, n_layer=0, n_class=n))) for n in (3, 40))
    for optimizer in (small, large):
        for parameter in optimizer.named.values():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step(1e-3)
    with pytest.raises(ValueError, match=r"head.prototypes: exp_avg of shape \(3, 8\) for a parameter of \(40, 8\)"):
        large.load_state(small.state())


def test_it_knows_how_much_its_state_will_grow() -> None:
    optimizer = adamw(SequenceModel(ModelConfig(vocab_size=5, d_model=8, n_layer=1)))
    to_come = optimizer.bytes_to_come()
    for parameter in optimizer.named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    held = sum(x.numel() * x.element_size() for state in optimizer.state().values() for x in state.values())
    assert held == to_come and optimizer.bytes_to_come() == 0
