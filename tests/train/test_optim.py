"""Parameter groups by one rule, the schedule as a function of the step, moments by name."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import pytest
import torch

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.bits import same
from protomamba.kernels import square_sums
from protomamba.train.optim import Optimizer, decays, first_non_finite, make_optimizer, total_norm
from protomamba.train.schedule import learning_rate


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


@pytest.mark.parametrize("schedule", ["cosine", "linear", "wsd", "constant"])
def test_every_schedule_warms_up_and_ends_at_its_floor(schedule: str) -> None:
    config = TrainConfig(lr=1.0, lr_warmup_steps=10, lr_min_scale=0.1, schedule=schedule)
    rates = [learning_rate(step, 110, config) for step in range(110)]
    assert rates[4] == 0.5 and rates[9] == rates[10] == 1.0
    assert rates[-1] == pytest.approx(1.0 if schedule == "constant" else 0.1)
    assert all(a >= b for a, b in pairwise(rates[10:]))
    if schedule == "wsd":
        assert rates[80] == 1.0 > rates[100]


def test_muon_moves_hidden_matrices_and_adamw_the_rest() -> None:
    model = SequenceModel(ModelConfig(vocab_size=5, d_model=8, n_layer=1), seed=0)
    optimizer = adamw(model, optimizer="muon", weight_decay=0.0)
    to_come = optimizer.bytes_to_come()
    for parameter in optimizer.named.values():
        parameter.grad = torch.randn_like(parameter, requires_grad=False)
    before = {name: p.detach().clone() for name, p in optimizer.named.items()}
    optimizer.step(1e-3, scale=0.5)
    state = optimizer.state()
    assert set(state["layers.0.mixer.in_proj.weight"]) == {"momentum_buffer"}
    assert (
        set(state["layers.0.mixer.conv1d.weight"])
        == set(state["embedding.weight"])
        == {"step", "exp_avg", "exp_avg_sq"}
    )
    assert sum(x.numel() * x.element_size() for s in state.values() for x in s.values()) == to_come
    moved = optimizer.named["layers.0.mixer.in_proj.weight"].detach() - before["layers.0.mixer.in_proj.weight"]
    singular = torch.linalg.svdvals(moved.double())
    assert float(singular.max() / singular.min()) < 3  # all directions alike; of a random matrix it is 6


def test_muons_state_comes_back() -> None:
    model = SequenceModel(ModelConfig(vocab_size=5, d_model=8, n_layer=1), seed=0)
    ids = torch.arange(20).reshape(2, 10) % 5
    trainer = Trainer(model, TrainConfig(optimizer="muon", steps=9, lr=1e-3))
    for _ in range(3):
        trainer.train_step(ids, ids)
    twin = Trainer(SequenceModel(model.config, seed=1), trainer.config)
    twin.model.load_state_dict(model.state_dict())
    twin.optimizer.load_state(trainer.optimizer.state())
    twin.load_state_dict(trainer.state_dict())
    twin.model.head.draws.copy_(model.head.draws)
    assert twin.train_step(ids, ids) == trainer.train_step(ids, ids)
    assert same(dict(twin.model.named_parameters()), dict(model.named_parameters()))


def stepped() -> Optimizer:
    optimizer = adamw(SequenceModel(ModelConfig(vocab_size=5, d_model=8, n_layer=1)))
    for parameter in optimizer.named.values():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step(1e-3)
    return optimizer


def test_what_an_update_wrote_is_known_to_be_finite_until_somebody_writes_to_it() -> None:
    optimizer = stepped()
    assert not any(optimizer.unverified().values())
    optimizer.state()["norm_f.weight"]["exp_avg"].view(-1)[0] = math.nan
    optimizer.state()["layers.0.norm.weight"]["exp_avg_sq"] = torch.ones(8)
    found = {name: list(slots) for name, slots in optimizer.unverified().items() if slots}
    assert found == {"norm_f.weight": ["exp_avg"], "layers.0.norm.weight": ["exp_avg_sq"]}


def test_a_loaded_state_is_not_known_to_be_finite() -> None:
    optimizer = stepped()
    optimizer.load_state(optimizer.state())
    assert all(set(slots) == {"exp_avg", "exp_avg_sq"} for slots in optimizer.unverified().values())


def test_a_moment_spoilt_behind_torchs_back_spoils_no_weight_and_is_seen_next() -> None:
    optimizer = stepped()
    optimizer.state()["head.prototypes"]["exp_avg"].data[0, 0] = math.nan
    optimizer.step(1e-3)
    assert all(p.isfinite().all() for p in optimizer.named.values())
    assert {name for name, slots in optimizer.unverified().items() if slots} == {"head.prototypes"}
