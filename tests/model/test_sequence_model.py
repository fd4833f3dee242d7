"""The whole model: one set of weights, three ways to run it; growth that changes nothing; freezing that holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.errors import ConfigError
from protomamba.model.mixers import Mamba, MixerOutput

LAYERS = ("mamba", "compact", "attention", "examples.lstm_layer:LSTMLayer")


def make(layer: str = "mamba", head: str = "hpn", n_layer: int = 2, **fields: object) -> SequenceModel:
    sizes = {"vocab_size": 23, "d_model": 12, "d_state": 5, "d_conv": 3, **fields}
    return SequenceModel(ModelConfig(layer=layer, head=head, n_layer=n_layer, **sizes), seed=3)


def batch(rows: int = 2, length: int = 13, seed: int = 0) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.randint(0, 23, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()


@pytest.mark.parametrize("layer", LAYERS)
def test_steps_give_what_the_whole_sequence_gives(layer: str) -> None:
    model, (tokens_BL, _) = make(layer), batch()
    with torch.no_grad():
        whole_BLD, _ = model.features(tokens_BL)
        state = model.initial_state()
        for position, tokens_B in enumerate(tokens_BL.unbind(1)):
            z_BD, state = model.decode_step(tokens_B, state)
            torch.testing.assert_close(z_BD, whole_BLD[:, position], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("cut", [1, 2, 6, 12])
def test_chunks_with_carried_state_give_what_the_whole_gives(layer: str, cut: int) -> None:
    model, (tokens_BL, targets_BL) = make(layer), batch()
    whole = model(tokens_BL, targets_BL)
    first, state = model(tokens_BL[:, :cut], targets_BL[:, :cut], return_state=True)
    second, _ = model(tokens_BL[:, cut:], targets_BL[:, cut:], state=state, return_state=True)
    torch.testing.assert_close((first * cut + second * (13 - cut)) / 13, whole, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layer", LAYERS)
def test_nothing_crosses_a_reset(layer: str) -> None:
    model, (tokens_BL, _) = make(layer), batch(rows=1)
    reset_BL = torch.zeros_like(tokens_BL, dtype=torch.bool)
    reset_BL[0, 5] = True
    with torch.no_grad():
        packed_BLD, _ = model.features(tokens_BL, reset_BL=reset_BL)
        alone_BLD, _ = model.features(tokens_BL[:, 5:])
    torch.testing.assert_close(packed_BLD[:, 5:], alone_BLD, rtol=1e-5, atol=1e-5)


def test_the_seed_alone_decides_the_weights_and_the_global_stream_is_left_alone() -> None:
    before = torch.get_rng_state()
    one, other = make(), make()
    assert torch.equal(torch.get_rng_state(), before)
    for (name, a), (_, b) in zip(one.named_parameters(), other.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_initialisation_is_the_published_one() -> None:
    mixer = make(d_model=48, d_state=4).layers[0].mixer
    assert torch.allclose(mixer.A_log.exp(), torch.arange(1.0, 5.0).expand(96, 4))
    assert torch.equal(mixer.D, torch.ones(96))
    dt_E = torch.nn.functional.softplus(mixer.dt_proj.bias)
    assert float(dt_E.detach().min()) > 0.9e-3 and float(dt_E.detach().max()) < 1.1e-1
    assert float(mixer.dt_proj.weight.detach().abs().max()) <= 3**-0.5  # R = ceil(48 / 16) = 3


@pytest.mark.parametrize("placement", ["append", "prepend", "insert:1", "specific:0,3"])
@pytest.mark.parametrize("layer", LAYERS)
def test_a_grown_model_gives_the_same_bits_and_every_new_parameter_trains(layer: str, placement: str) -> None:
    model, (tokens_BL, targets_BL) = make(layer), batch()
    before_BLV = model.scores(tokens_BL)
    origins = model.grow(4, placement, seed=9)
    assert torch.equal(model.scores(tokens_BL), before_BLV)
    assert [o for o in origins if o is not None] == [0, 1] and len(model.layers) == 4 == model.config.n_layer
    trainer = Trainer(model, TrainConfig(lr=1e-2, bp_cadence_steps=1, ff_lr=0.0))
    trainer.train_step(tokens_BL, targets_BL)
    after_one = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer.train_step(tokens_BL, targets_BL)
    new = [f"layers.{i}." for i, origin in enumerate(origins) if origin is None]
    for name, parameter in model.named_parameters():
        if name.startswith(tuple(new)):
            assert not torch.equal(parameter, after_one[name]), f"{name} did not move"


def test_growing_again_and_growing_nothing() -> None:
    model, (tokens_BL, _) = make(), batch()
    before_BLV = model.scores(tokens_BL)
    assert model.grow(2, "specific:1,3,4,5") == [0, 1]
    model.grow(3, "prepend")
    model.grow(6, "insert:2")
    assert torch.equal(model.scores(tokens_BL), before_BLV)


def test_frozen_parameters_never_change_and_have_no_state() -> None:
    model, (tokens_BL, targets_BL) = make(n_layer=3), batch()
    assert model.freeze("indices:0,2", embedding=True) == {0, 2}
    frozen = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    assert set(frozen) == {
        n for n, _ in model.named_parameters() if n.startswith(("layers.0", "layers.2", "embedding"))
    }
    trainer = Trainer(model, TrainConfig(lr=1e-2, bp_cadence_steps=2, ff_lr=1e-2, weight_decay=0.5))
    for _ in range(4):
        trainer.train_step(tokens_BL, targets_BL)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, frozen.get(name, parameter)), f"{name} moved"
    assert not frozen.keys() & trainer.optimizer.state().keys()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    model.freeze("none")
    assert all(p.requires_grad for p in model.parameters())


def test_nothing_below_the_lowest_trainable_parameter_is_kept_for_backward() -> None:
    model, (tokens_BL, targets_BL) = make(n_layer=3), batch()
    model.freeze("first:3", embedding=True)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        loss = model(tokens_BL, targets_BL)
    inner = 2 * 12 * 2 * 13  # E x B x L: what any layer would keep
    assert loss.requires_grad and max(saved) < inner


def test_scores_predictions_and_classes() -> None:
    model, (tokens_BL, targets_BL) = make(n_class=7), batch()
    assert model.scores(tokens_BL).shape == (2, 13, 7)
    assert torch.equal(model.predict(tokens_BL), model.scores(tokens_BL).argmax(-1))
    labels_BL = torch.full_like(targets_BL, -100)
    labels_BL[:, -1] = 3
    assert torch.isfinite(model(tokens_BL, labels_BL))


@pytest.mark.parametrize(
    ("field", "name", "says"),
    [
        ("layer", "mambo", "expected .*mamba.* or package.module:Class .did you mean mamba"),
        ("layer", "no_such_module:Layer", "cannot import no_such_module"),
        ("layer", "examples.lstm_layer:Missing", "has no Missing"),
        ("layer", "torch.nn:Linear", "expected a subclass of Mixer"),
        ("head", "torch.nn:Linear", "expected a subclass of Head"),
    ],
)
def test_a_class_that_cannot_be_used_is_named(field: str, name: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make(**{field: name})


def test_a_tied_softmax_head_shares_the_embedding() -> None:
    model = make(head="softmax", tie_embedding=True)
    assert model.head.weight is model.embedding.weight
    with pytest.raises(ConfigError, match="tie-embedding"):
        make(head="hpn", tie_embedding=True)


class DoubledMixer(Mamba):
    """Twice the output: a class derived from ours that overrides one method."""

    def forward(self, x_BLD, ctx):  # type: ignore[no-untyped-def]
        y_BLD, state = super().forward(x_BLD, ctx)
        return MixerOutput(2 * y_BLD, state)


class OwnNorm(torch.nn.LayerNorm):
    """In place of ours."""


def changed_models() -> dict[str, SequenceModel]:
    models = {name: make() for name in ("norm", "hook")}
    models["layer"] = make(f"{__name__}:DoubledMixer")
    models["norm"].norm_f = OwnNorm(12)  # type: ignore[assignment]
    models["hook"].embedding.register_forward_hook(lambda module, inputs, output: 3 * output)
    return models


@pytest.mark.parametrize("what", ["layer", "norm", "hook"])
def test_a_decoder_of_a_changed_model_is_that_model(what: str) -> None:
    model, (tokens_BL, _) = changed_models()[what], batch()
    with torch.no_grad():
        _, state = model.features(tokens_BL[:, :4], return_state=True)
        decode = model.make_decode_fn(state)
        for position in range(4, 9):
            whole_BLD, _ = model.features(tokens_BL[:, : position + 1])
            expected_BV = model.head.next_logits(whole_BLD[:, -1])
            torch.testing.assert_close(decode(tokens_BL[:, position]), expected_BV, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("placement", "frozen"), [("append", {0}), ("prepend", {1}), ("insert:1", {0})])
def test_what_is_frozen_stays_so_where_growing_puts_it(placement: str, frozen: set[int], tmp_path: Path) -> None:
    trainer = Trainer(make(), TrainConfig(bp_cadence_steps=1))
    trainer.freeze("first:1")
    trainer.grow(3, placement)
    trainer.save_checkpoint(tmp_path / "grown.safetensors")
    for model in (trainer.model, Trainer.load_checkpoint(tmp_path / "grown.safetensors").model):
        still = {i for i, layer in enumerate(model.layers) if not any(p.requires_grad for p in layer.parameters())}
        assert still == frozen
