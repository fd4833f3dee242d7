"""What is done to any one module, alone, acts in training, prediction and decoding, or raises one line that says so."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from protomamba import (
    ConfigError,
    ModelConfig,
    Sampling,
    SequenceModel,
    TrainConfig,
    Trainer,
    UserError,
    generate,
    kernels,
)
from protomamba.bits import same
from protomamba.model.mixers.mamba import CausalConv1d

# Containers, which torch does not call, and what prediction reads by other methods than forward.
NOT_CALLED = {"layers"}
NOT_CALLED_TO_PREDICT = {"", "head"}


def make(layer: str = "mamba", head: str = "softmax", **fields: Any) -> SequenceModel:
    sizes = {"vocab_size": 32, "d_model": 16, "n_layer": 2, "layer": layer, "head": head, **fields}
    return SequenceModel(ModelConfig(**sizes), seed=0)


def batch() -> tuple[Tensor, Tensor]:
    tokens_BL = torch.randint(0, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    return tokens_BL, tokens_BL.roll(-1, 1)


def stepped(model: SequenceModel, tokens_BL: Tensor) -> Tensor:
    state, found = model.initial_state(), []
    for tokens_B in tokens_BL.unbind(1):
        z_BD, state = model.decode_step(tokens_B, state)
        found.append(z_BD)
    return torch.stack(found, 1)


MODULES = {
    layer: [name for name, _ in make(layer).named_modules() if name not in NOT_CALLED]
    for layer in ("mamba", "attention")
}


HOOKS: dict[str, Callable[[nn.Module, list[int]], object]] = {
    "forward": lambda module, fired: module.register_forward_hook(lambda *_: fired.append(1), with_kwargs=True),
    "before": lambda module, fired: module.register_forward_pre_hook(lambda *_: fired.append(1)),
    "backward": lambda module, fired: module.register_full_backward_hook(lambda *_: fired.append(1)),
}


@pytest.mark.parametrize("kind", HOOKS)
@pytest.mark.parametrize("layer", MODULES)
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients")
def test_a_hook_on_any_one_module_fires(layer: str, kind: str) -> None:
    tokens_BL, targets_BL = batch()
    for name in MODULES[layer]:
        model, fired = make(layer), list[int]()
        HOOKS[kind](model.get_submodule(name), fired)
        for model.precision in ("fp32", "bf16"):
            model(tokens_BL, targets_BL).backward()
            assert fired, f"{name}, training in {model.precision}"
            fired.clear()
        if kind == "backward" or name in NOT_CALLED_TO_PREDICT:
            continue
        state = model.eval().scores(tokens_BL, return_state=True)[1]
        assert fired, f"{name}, prediction"
        decode = model.make_decode_fn(state)
        fired.clear()
        decode(tokens_BL[:, 0])
        assert fired, f"{name}, decoding"


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


NORMS: dict[str, Callable[[nn.Module], object]] = {
    "parametrization": lambda module: parametrize.register_parametrization(module, "weight", Double()),
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
}


@pytest.mark.parametrize("what", NORMS)
@pytest.mark.parametrize("layer", MODULES)
def test_a_parametrization_of_any_projection_acts_and_trains(layer: str, what: str) -> None:
    tokens_BL, targets_BL = batch()
    before = make(layer).features(tokens_BL)[0]
    for name in (name for name in MODULES[layer] if name.startswith("layers.0.mixer.")):
        model = make(layer)
        NORMS[what](model.get_submodule(name))
        trainer = Trainer(model, TrainConfig(lr=0.05))
        trainer.train_step(tokens_BL, targets_BL)
        model.eval()
        with torch.no_grad():
            whole_BLD = model.features(tokens_BL)[0]
            torch.testing.assert_close(stepped(model, tokens_BL), whole_BLD, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(model.features(tokens_BL, precision="bf16")[0], whole_BLD, rtol=0.1, atol=0.1)
        assert not torch.allclose(whole_BLD, before, atol=1e-3), name
        with pytest.raises(UserError, match=name):
            model.save_pretrained("unused")


def test_dropout_of_a_block_follows_its_own_mode_and_may_be_replaced() -> None:
    tokens_BL, targets_BL = batch()
    model = make(dropout=0.5).eval()
    quiet = model.scores(tokens_BL)
    model.layers[0].dropout.train()  # Monte Carlo dropout: torch asks the module, not the model
    assert not torch.allclose(model.scores(tokens_BL), quiet, atol=1e-4)
    assert not torch.allclose(model.head.scores(stepped(model, tokens_BL)), quiet, atol=1e-4)
    for block in model.layers:
        block.dropout = nn.Identity()
    model.dropout = nn.Identity()
    assert torch.isfinite(model.train()(tokens_BL, targets_BL))
    torch.testing.assert_close(model.scores(tokens_BL), quiet, rtol=1e-4, atol=1e-5)
    assert generate(model, [[1, 2]], Sampling(max_tokens=3))


def test_a_convolution_that_cannot_stand_for_ours_is_refused_in_one_line_and_one_that_can_is_used() -> None:
    class Louder(nn.Module):
        def __init__(self, inner: CausalConv1d) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, *args: Any) -> Any:
            output, state = self.inner(*args)
            return 2 * output, state

    model, (tokens_BL, targets_BL) = make(), batch()
    mixer = model.layers[0].mixer
    own, before = mixer.conv1d, model.scores(tokens_BL)
    for other in (nn.Conv1d(32, 32, 4, groups=32, padding=3), nn.Identity()):
        mixer.conv1d = other
        with pytest.raises(TypeError, match=r"conv1d is \w+, .* expected a CausalConv1d") as caught:
            model(tokens_BL, targets_BL)
        assert "\n" not in str(caught.value)
    mixer.conv1d = Louder(own)
    assert not torch.allclose(model.scores(tokens_BL), before, atol=1e-4)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("layers.0", "layers.0 is Identity"),
        ("layers.0.mixer", "mixer of a layer is Identity"),
        ("head", "head is Identity"),
    ],
)
def test_a_part_that_is_none_of_ours_is_named(place: str, says: str) -> None:
    model = make()
    model.set_submodule(place, nn.Identity())
    with pytest.raises(TypeError, match=says):
        model(*batch())


def test_inputs_outside_the_model_are_named() -> None:
    model, (tokens_BL, targets_BL) = make(), batch()
    with pytest.raises(IndexError, match=r"expected 0 to 31 \(vocab_size\)"):
        model(tokens_BL + 32, targets_BL)
    with pytest.raises(ValueError, match="one entry per layer, 2 of them, got 1"):
        model(tokens_BL, targets_BL, state=[None])


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_second_derivatives_are_refused_or_right_never_left_out(head: str) -> None:
    def loss_and_penalty(model: SequenceModel) -> tuple[Tensor, Tensor]:
        loss = model(*batch())
        gradients = torch.autograd.grad(loss, [model.norm_f.weight, model.layers[0].mixer.D], create_graph=True)
        return loss, torch.stack([(each**2).sum() for each in gradients]).sum()

    with pytest.raises(RuntimeError, match="no second derivatives"):
        sum(loss_and_penalty(make(head=head))).backward()
    kernels.set_kernels("reference")
    try:
        model = make(head=head).double()
        loss_and_penalty(model)[1].backward()
        weight_D, penalties = model.norm_f.weight, []
        for step in (1e-5, -2e-5):
            weight_D.data[3] += step
            penalties.append(float(loss_and_penalty(model)[1].detach()))
        assert weight_D.grad is not None
        slope = (penalties[0] - penalties[1]) / 2e-5
        assert float(weight_D.grad[3]) == pytest.approx(slope, rel=1e-4, abs=1e-8)
    finally:
        kernels.set_kernels("auto")


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_a_model_in_float64_trains_and_its_checkpoint_goes_on_to_the_bit(head: str, tmp_path: Path) -> None:
    trainer = Trainer(make(head=head).to(torch.float64), TrainConfig(lr=1e-2))
    losses = [trainer.train_step(*batch()).loss for _ in range(6)]
    assert losses[-1] < losses[0]
    trainer.save_checkpoint(tmp_path / "double.safetensors")
    loaded = Trainer.load_checkpoint(tmp_path / "double.safetensors")
    assert {p.dtype for p in loaded.model.parameters()} == {torch.float64}
    trainer.train_step(*batch())
    loaded.train_step(*batch())
    for (name, p), (_, q) in zip(trainer.model.named_parameters(), loaded.model.named_parameters(), strict=True):
        assert same(p.detach(), q.detach()), name


def test_a_tied_table_stays_one_tensor_however_the_model_is_copied() -> None:
    def by_torch(model: SequenceModel) -> Any:
        stored = io.BytesIO()
        torch.save(model, stored)
        return torch.load(io.BytesIO(stored.getvalue()), weights_only=False)

    model = make(tie_embedding=True)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), by_torch(model)):
        assert copied.head.weight is copied.embedding.weight is not model.embedding.weight
        Trainer(copied, TrainConfig(lr=1e-2)).train_step(*batch())
        assert copied.head.weight is copied.embedding.weight
    model.double().load_state_dict(make(tie_embedding=True).state_dict())
    assert model.head.weight is model.embedding.weight


def test_weights_load_through_a_wrapper_and_into_a_model_on_the_meta_device() -> None:
    class Wrapper(nn.Module):
        def __init__(self, model: SequenceModel) -> None:
            super().__init__()
            self.module = model

    source, (tokens_BL, targets_BL) = make(), batch()
    wrapped = Wrapper(SequenceModel(source.config, seed=9))
    wrapped.load_state_dict({f"module.{name}": tensor for name, tensor in source.state_dict().items()})
    with torch.device("meta"):
        empty = SequenceModel(source.config)
    empty.load_state_dict(source.state_dict(), assign=True)
    for model in (wrapped.module, empty):
        assert same(model.scores(tokens_BL), source.scores(tokens_BL))
        Trainer(model, TrainConfig()).train_step(tokens_BL, targets_BL)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("how", ["trace", "script", "fx"])
def test_other_programs_of_the_model_are_refused_in_one_line(how: str) -> None:
    """They failed inside torch, with what it found there."""
    model, (tokens_BL, _) = make(), batch()
    make_program = {
        "trace": lambda: torch.jit.trace(model, (tokens_BL,)),
        "script": lambda: torch.jit.script(model),
        "fx": lambda: torch.fx.symbolic_trace(model),
    }[how]
    with pytest.raises(UserError, match=r"cannot see into the kernels; protomamba export writes .* torch.compile"):
        make_program()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torch_export_is_refused_in_one_line() -> None:
    with pytest.raises((UserError, ConfigError), match=r"torch.export cannot see into the kernels"):
        torch.export.export(make(), batch())
