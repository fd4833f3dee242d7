"""Mixers as modules: called, hooked, wrapped and derived from; by one kernel only where nobody could tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from protomamba import ForwardContext, ModelConfig, Sampling, SequenceModel, TrainConfig, Trainer, generate
from protomamba.bits import same
from protomamba.errors import ConfigError
from protomamba.kernels import set_kernels
from protomamba.model.mixers import Block, Mamba

KINDS = ("mamba", "compact")


def make(layer: str = "mamba", **fields: Any) -> SequenceModel:
    sizes = {"vocab_size": 23, "d_model": 12, "d_state": 5, "d_conv": 3, "n_layer": 2, **fields}
    return SequenceModel(ModelConfig(layer=layer, **sizes), seed=3)


def batch(rows: int = 2, length: int = 13) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.randint(0, 23, (rows, length + 1), generator=torch.Generator().manual_seed(0))
    return tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()


def unfuse(model: SequenceModel) -> None:
    """Every block module by module: a hook that does nothing is enough."""
    for block in model.blocks():
        block.mixer.out_proj.register_forward_hook(lambda *_: None)  # type: ignore[union-attr, operator]


def gradients(model: SequenceModel, **call: Any) -> dict[str, Tensor]:
    tokens_BL, targets_BL = batch()
    model(tokens_BL, targets_BL, **call).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize("reset", [False, True])
def test_module_by_module_is_the_kernel_in_float64(layer: str, reset: bool) -> None:
    one, other = make(layer).double(), make(layer).double()
    unfuse(other)
    tokens_BL, _ = batch()
    reset_BL = (tokens_BL % 4 == 1) if reset else None
    (z, states), (y, others) = (m.features(tokens_BL, reset_BL=reset_BL, return_state=True) for m in (one, other))
    torch.testing.assert_close(y, z, rtol=1e-10, atol=1e-12)
    for a, b in zip(states, others, strict=True):
        torch.testing.assert_close(a[0], b[0], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(a[1], b[1], rtol=1e-10, atol=1e-12)
    expected, found = gradients(one, reset_BL=reset_BL), gradients(other, reset_BL=reset_BL)
    assert expected.keys() == found.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


@pytest.mark.parametrize("layer", KINDS)
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 2e-5), ("bf16", 4e-2)])
def test_module_by_module_is_the_kernel_within_rounding(layer: str, precision: str, tolerance: float) -> None:
    one, other = make(layer), make(layer)
    unfuse(other)
    tokens_BL, _ = batch()
    z, y = (model.features(tokens_BL, precision=precision)[0] for model in (one, other))
    torch.testing.assert_close(y, z, rtol=tolerance, atol=tolerance)
    assert one.unfused_reasons() == {} and other.unfused_reasons().keys() == {"layers.0", "layers.1"}


def test_a_mixer_alone_can_be_called() -> None:
    mixer = make().layers[0].mixer
    y_BLD, state = mixer(torch.randn(2, 5, 12))
    assert y_BLD.shape == (2, 5, 12) and state is None
    assert mixer(torch.randn(2, 5, 12), ForwardContext(return_state=True)).state is not None


class Adapter(nn.Module):
    """A low-rank addition to a linear layer: what LoRA is."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.A = nn.Parameter(torch.randn(rank, base.in_features) * 0.1)
        self.B = nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.A.t() @ self.B.t()


@pytest.mark.parametrize("name", ["in_proj", "x_proj", "dt_proj", "out_proj"])
def test_an_adapter_changes_outputs_trains_and_leaves_the_rest_alone(name: str) -> None:
    model, (tokens_BL, targets_BL) = make(head="softmax"), batch()
    before = model.scores(tokens_BL)
    mixer = model.layers[0].mixer
    model.requires_grad_(False)
    setattr(mixer, name, Adapter(getattr(mixer, name)))
    torch.testing.assert_close(model.scores(tokens_BL), before, rtol=1e-4, atol=1e-5)  # B is 0: the same in rounding
    assert model.unfused_reasons() == {"layers.0": f"mixer.{name} is Adapter, not Linear"}
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, TrainConfig(lr=0.1, bp_cadence_steps=1, ff_lr=0.0))
    losses = [trainer.train_step(tokens_BL, targets_BL).loss for _ in range(12)]
    assert losses[-1] < losses[0] and not torch.allclose(model.scores(tokens_BL), before, rtol=1e-5, atol=1e-6)
    assert all(torch.equal(p, frozen[n]) for n, p in model.named_parameters() if n in frozen)
    with pytest.raises(Exception, match=f"layers.0.mixer.{name}"):
        trainer.save_checkpoint("unused.safetensors")


def changes() -> dict[str, Callable[[Mamba], object]]:
    def biased(mixer: Mamba) -> None:
        linear = nn.Linear(mixer.in_proj.in_features, mixer.in_proj.out_features)
        nn.init.constant_(linear.bias, 0.5)
        mixer.in_proj = linear

    class Double(nn.Module):
        def forward(self, weight: Tensor) -> Tensor:
            return 2 * weight

    return {
        "hook on conv1d": lambda m: m.conv1d.register_forward_hook(lambda _m, _a, out: (out[0] * 2, out[1])),
        "pre-hook on x_proj": lambda m: m.x_proj.register_forward_pre_hook(lambda _m, args: (args[0] * 2,)),
        "hook on the mixer": lambda m: m.register_forward_hook(lambda _m, _a, out: (out[0] * 2, out[1])),
        "bias": biased,
        "parametrization": lambda m: parametrize.register_parametrization(m.x_proj, "weight", Double()),
        "of the mixer's own": lambda m: parametrize.register_parametrization(m, "D", Double()),
        "pruning": lambda m: prune.random_unstructured(m.out_proj, "weight", amount=0.5),
    }


@pytest.mark.parametrize("what", changes())
def test_what_is_done_to_a_module_acts_in_every_way_to_run_the_model(what: str) -> None:
    plain, changed, (tokens_BL, _) = make(head="softmax"), make(head="softmax"), batch(rows=1)
    changes()[what](changed.layers[0].mixer)  # type: ignore[arg-type]
    with torch.no_grad():
        whole_BLD, _ = changed.features(tokens_BL)
        assert not torch.allclose(whole_BLD, plain.features(tokens_BL)[0], atol=1e-4), "it did nothing"
        state = changed.initial_state()
        for position, tokens_B in enumerate(tokens_BL.unbind(1)):
            z_BD, state = changed.decode_step(tokens_B, state)
            torch.testing.assert_close(z_BD, whole_BLD[:, position], rtol=1e-4, atol=1e-4)
    (found,) = generate(changed, tokens_BL[:, :4], Sampling(max_tokens=5, temperature=0))
    seen = torch.cat([tokens_BL[:, :4], torch.tensor([found[:-1]])], 1)
    assert found[-1] == int(changed.predict(seen)[0, -1])
    assert changed.unfused_reasons().keys() == {"layers.0"}


def test_a_hook_on_every_module_of_the_process_fires_inside_blocks() -> None:
    model, (tokens_BL, targets_BL) = make(), batch()
    seen: set[type] = set()
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.add(type(module)))
    try:
        model(tokens_BL, targets_BL)
    finally:
        handle.remove()
    assert {nn.Linear, Mamba, Block} <= seen
    assert model.unfused_reasons() == {}


def test_a_block_that_is_hooked_alone_keeps_its_kernel() -> None:
    model, (tokens_BL, _) = make(), batch()
    model.layers[0].register_forward_hook(lambda _m, _a, out: (out[0] + 1, out[1]))
    assert model.unfused_reasons() == {} and model.layers[0].is_fused()  # type: ignore[operator]
    state = model.initial_state()
    with torch.no_grad():
        whole_BLD, _ = model.features(tokens_BL)
        for position, tokens_B in enumerate(tokens_BL.unbind(1)):
            z_BD, state = model.decode_step(tokens_B, state)
            torch.testing.assert_close(z_BD, whole_BLD[:, position], rtol=1e-4, atol=1e-4)


def test_growth_freezing_and_a_carried_state_of_a_stack_of_kinds() -> None:
    model, (tokens_BL, targets_BL) = make(layers="mamba*2,attention", n_layer=3), batch()
    before = model.scores(tokens_BL)
    assert model.grow(5) == [0, 1, 2, None, None] and same(model.scores(tokens_BL), before)
    kinds = [type(block.mixer).__name__ for block in model.blocks()]
    assert kinds == ["Mamba", "Mamba", "Attention", "Mamba", "Mamba"]
    model.freeze("indices:1,2")
    frozen = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    trainer = Trainer(model, TrainConfig(lr=1e-2, bp_cadence_steps=2))
    for _ in range(4):
        trainer.train_step(tokens_BL, targets_BL)
    assert frozen and all(same(p.detach(), frozen[n]) for n, p in model.named_parameters() if n in frozen)


def test_an_old_layer_must_be_of_its_new_places_kind() -> None:
    model = make(layers="mamba*2,attention", n_layer=3)
    with pytest.raises(ConfigError, match="layer 1 is mamba and would come to place 2, where --layers has attention"):
        model.grow(4, "prepend")
    assert model.grow(4, "prepend", layers="compact,mamba*2,attention") == [None, 0, 1, 2]
    assert model.config.kinds(4) == ["compact", "mamba", "mamba", "attention"]


def test_dropout_drops_in_training_alone_and_by_torchs_generator() -> None:
    model, (tokens_BL, targets_BL) = make(dropout=0.5), batch()
    plain = make()
    assert same(model.eval()(tokens_BL, targets_BL).detach(), plain.eval()(tokens_BL, targets_BL).detach())

    def drawn(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model.train().features(tokens_BL)[0].detach()

    assert same(drawn(1), drawn(1)) and not same(drawn(1), drawn(2))
    torch.manual_seed(1)
    greedy = Sampling(max_tokens=5, temperature=0)
    assert generate(model, [[1, 2]], greedy) == generate(plain, [[1, 2]], greedy)


def test_dropout_by_the_kernel_is_dropout_module_by_module() -> None:
    one, other = make(dropout=0.4).double(), make(dropout=0.4).double()
    unfuse(other)
    torch.manual_seed(5)
    expected = gradients(one)
    torch.manual_seed(5)
    found = gradients(other)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-8, atol=1e-10, msg=name)


def vectors() -> SequenceModel:
    config = ModelConfig(vocab_size=4, d_model=12, d_state=4, input="vector", input_options={"channels": 3})
    return SequenceModel(config, seed=1)


def test_vectors_learn_and_a_missing_value_is_not_a_zero() -> None:
    model = vectors()
    values_BLC = torch.randn(8, 11, 3, generator=torch.Generator().manual_seed(3))
    targets_BL = values_BLC.argmax(-1)
    targets_BL[values_BLC[..., 0] > 1] = 3
    values_BLC[values_BLC[..., 0] > 1] = float("nan")
    assert not torch.allclose(model.scores(values_BLC), model.scores(values_BLC.nan_to_num()))
    trainer = Trainer(model, TrainConfig(lr=1e-2, bp_cadence_steps=1, ff_lr=0.0))
    for _ in range(60):
        stats = trainer.train_step(values_BLC, targets_BL)
    assert not stats.skipped_update and (model.predict(values_BLC) == targets_BL).float().mean() > 0.9


def test_vectors_in_chunks_and_steps_and_errors() -> None:
    model, values_BLC = vectors(), torch.randn(2, 7, 3)
    with torch.no_grad():
        whole_BLD, _ = model.features(values_BLC)
        state = model.initial_state()
        for position in range(7):
            z_BD, state = model.decode_step(values_BLC[:, position], state)
            torch.testing.assert_close(z_BD, whole_BLD[:, position], rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"expected floating values \(B, L, 3\), got torch.float32 of shape \(7, 3\)"):
        model.features(values_BLC[0])
    with pytest.raises(ConfigError, match="give --input-option channels=C"):
        SequenceModel(ModelConfig(vocab_size=4, d_model=8, input="vector"))
    with pytest.raises(ConfigError, match="has no table of tokens to share"):
        SequenceModel(model.config.replace(head="softmax", tie_embedding=True))


def test_native_and_reference_agree_module_by_module() -> None:
    model, (tokens_BL, _) = make(), batch()
    unfuse(model)
    with torch.no_grad():
        native_BLD, _ = model.features(tokens_BL)
        set_kernels("reference")
        try:
            reference_BLD, _ = model.features(tokens_BL)
        finally:
            set_kernels("auto")
    torch.testing.assert_close(native_BLD, reference_BLD, rtol=1e-5, atol=1e-5)
