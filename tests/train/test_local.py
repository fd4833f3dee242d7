"""The local loss against its definition, its gradient against autograd in float64, the surgery against its formulas."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.train.local import STD_EPS, LocalSignals, activation_sums, combine, local_gradient


def definition(u_BLE: Tensor, weight_E: Tensor) -> Tensor:
    """The local loss, written as model.md states it."""
    batch, length, width = u_BLE.shape
    shifted_BLE = torch.cat([torch.zeros(batch, 1, width, dtype=u_BLE.dtype), u_BLE[:, :-1]], dim=1)
    odd_LE = (torch.arange(length)[:, None] + torch.arange(width)[None]) % 2 == 1
    corrupted_BLE = torch.where(odd_LE, -shifted_BLE, shifted_BLE)

    def goodness(h_E: Tensor) -> Tensor:
        return (h_E / (h_E.std(unbiased=False) + STD_EPS) * weight_E / weight_E.norm()).sum()

    return torch.clamp_min(1 - (goodness(u_BLE.mean((0, 1))) - goodness(corrupted_BLE.mean((0, 1)))), 0)


@pytest.mark.parametrize(
    "shape", [(1, 1, 4), (2, 2, 3), (3, 17, 6), (2, 64, 5)], ids=lambda s: "B{}-L{}-E{}".format(*s)
)
@pytest.mark.parametrize("scale", [0.01, 3.0])
def test_loss_and_gradient_are_the_definition_s(shape: tuple[int, int, int], scale: float) -> None:
    generator = torch.Generator().manual_seed(sum(shape))
    u_BLE = torch.randn(shape, dtype=torch.float64, generator=generator)
    weight_E = (scale * torch.randn(shape[2], dtype=torch.float64, generator=generator)).requires_grad_()
    loss = definition(u_BLE, weight_E)
    (expected_E,) = torch.autograd.grad(loss, weight_E, allow_unused=True)
    positive_E, negative_E = activation_sums(u_BLE)
    count = shape[0] * shape[1]
    gradient_E, found = local_gradient(positive_E / count, negative_E / count, weight_E.detach())
    assert found == pytest.approx(float(loss.detach()), abs=1e-12)
    torch.testing.assert_close(gradient_E, expected_E, rtol=1e-10, atol=1e-12)


def test_a_satisfied_margin_has_no_gradient() -> None:
    u_BLE = torch.ones(2, 8, 4, dtype=torch.float64)
    weight_E = torch.ones(4, dtype=torch.float64)
    positive_E, negative_E = activation_sums(u_BLE)
    gradient_E, loss = local_gradient(100 * positive_E + torch.arange(4), negative_E, weight_E)
    assert loss == 0.0 and not gradient_E.any()


def test_micro_batches_add_up_to_the_batch() -> None:
    u_BLE, weight_E = torch.randn(4, 9, 6), torch.randn(6)
    whole, parts = LocalSignals(), LocalSignals()
    whole(0, u_BLE)
    parts(0, u_BLE[:1])
    parts(0, u_BLE[1:])
    torch.testing.assert_close(parts.gradient(0, weight_E), whole.gradient(0, weight_E), rtol=1e-4, atol=1e-5)


def test_surgery() -> None:
    local_E, conflicting_E, agreeing_E = torch.tensor([1.0, 1.0]), torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 0.0])

    def mixed(global_E: Tensor, **fields: object) -> tuple[Tensor, bool]:
        return combine(local_E, global_E, TrainConfig(lr=1e-2, ff_lr=1e-3, gradient_surgery_epsilon=0.0, **fields))

    ratio = 0.1
    torch.testing.assert_close(mixed(conflicting_E), (conflicting_E + ratio * torch.tensor([0.0, 1.0]), True))
    torch.testing.assert_close(mixed(agreeing_E), (agreeing_E + ratio * local_E, False))
    half = mixed(conflicting_E, gradient_surgery_method="cagradstep", cagrad_lambda=0.5)
    torch.testing.assert_close(half, (conflicting_E + ratio * torch.tensor([0.5, 1.0]), True))
    distance = (local_E / local_E.norm() - conflicting_E / conflicting_E.norm()).norm()
    scaled = mixed(conflicting_E, gradient_surgery_method="gradnorm", gradnorm_alpha=0.2)
    torch.testing.assert_close(scaled, (conflicting_E + ratio * local_E * torch.exp(0.2 * distance), True))


def test_without_backpropagation_only_d_moves_by_its_local_gradient() -> None:
    model = SequenceModel(ModelConfig(vocab_size=11, d_model=8, n_layer=2), seed=1)
    model.freeze("first:1")
    tokens_BL = torch.randint(0, 11, (2, 16), generator=torch.Generator().manual_seed(0))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    taps: dict[int, Tensor] = {}
    with torch.no_grad():
        model(tokens_BL, tokens_BL, activation_hook=lambda layer, u_BLE: taps.__setitem__(layer, u_BLE.clone()))
    assert set(taps) == {1}
    trainer = Trainer(model, TrainConfig(bp_cadence_steps=2, ff_lr=0.5))
    stats = trainer.train_step(tokens_BL, tokens_BL)
    assert not stats.bp_applied and stats.grad_norm is None and stats.ff_loss is not None
    weight = before["layers.1.mixer.D"].double().requires_grad_()
    (gradient_E,) = torch.autograd.grad(definition(taps[1].double(), weight), weight)
    for name, parameter in model.named_parameters():
        if name == "layers.1.mixer.D":
            torch.testing.assert_close(
                parameter.detach().double(), weight.detach() - 0.5 * gradient_E, rtol=1e-5, atol=1e-6
            )
        else:
            assert torch.equal(parameter, before[name]), name
    assert trainer.optimizer.state() == {}
    assert trainer.train_step(tokens_BL, tokens_BL).bp_applied


def test_a_step_without_backpropagation_records_no_graph() -> None:
    model = SequenceModel(ModelConfig(vocab_size=11, d_model=8, n_layer=2), seed=1)
    trainer = Trainer(model, TrainConfig(bp_cadence_steps=3))
    tokens_BL = torch.zeros(1, 4, dtype=torch.int64)

    def refuse(_: Tensor) -> Tensor:
        raise AssertionError("a tensor was saved for backward")

    with torch.autograd.graph.saved_tensors_hooks(refuse, lambda t: t):
        trainer.train_step(tokens_BL, tokens_BL)


@pytest.mark.parametrize("method", ["pcgrad", "gradnorm", "cagradstep"])
def test_a_satisfied_margin_without_epsilon_adds_nothing(method: str) -> None:
    config = TrainConfig(gradient_surgery_method=method, gradient_surgery_epsilon=0.0)
    global_E = torch.randn(4)
    assert torch.equal(combine(torch.zeros(4), global_E, config)[0], global_E)
    assert combine(torch.ones(4), torch.zeros(4), config)[0].isfinite().all()
