"""What people do to a torch model, done to ours: it works, or an error says what to do; nothing happens silently."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn.utils import parametrize, prune

from protomamba import ConfigError, ModelConfig, Sampling, SequenceModel, TrainConfig, Trainer, UserError, generate
from protomamba.bits import same
from protomamba.model.heads import SoftmaxHead

HEADS = ("hpn", "softmax")


def make(head: str = "hpn", **fields: Any) -> SequenceModel:
    return SequenceModel(ModelConfig(**{"vocab_size": 32, "d_model": 16, "n_layer": 2, "head": head, **fields}), seed=0)


def batch(rows: int = 2, length: int = 12) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.randint(0, 32, (rows, length), generator=torch.Generator().manual_seed(1))
    return tokens_BL, tokens_BL.roll(-1, 1)


def plain(**fields: Any) -> TrainConfig:
    return TrainConfig(**{"bp_cadence_steps": 1, "ff_lr": 0.0, "lr": 1e-2, **fields})


@pytest.mark.parametrize("head", HEADS)
def test_without_targets_the_model_gives_differentiable_logits(head: str) -> None:
    model, (tokens_BL, targets_BL) = make(head), batch()
    logits_BLV = model(tokens_BL)
    assert logits_BLV.shape == (2, 12, 32)
    nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten()).backward()
    assert model.layers[0].mixer.in_proj.weight.grad is not None
    first, state = model(tokens_BL[:, :5], return_state=True)
    second = model(tokens_BL[:, 5:], state=state)
    torch.testing.assert_close(torch.cat([first, second], 1), logits_BLV, rtol=1e-4, atol=1e-5)


def test_scores_and_predictions_go_on_from_a_state() -> None:
    model, (tokens_BL, _) = make().eval(), batch()
    for method in (model.scores, model.predict):
        first, state = method(tokens_BL[:, :7], return_state=True)
        second = method(tokens_BL[:, 7:], state=state)
        torch.testing.assert_close(torch.cat([first, second], 1), method(tokens_BL), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch"s own, on loading its compiler
def test_torch_compile_may_leave_the_model_as_it_is_and_trains_it() -> None:
    model, (tokens_BL, targets_BL) = make(), batch()
    compiled, expected = torch.compile(model), make()
    loss = compiled(tokens_BL, targets_BL)
    loss.backward()
    same_loss = expected(tokens_BL, targets_BL)
    same_loss.backward()
    assert same(loss.detach(), same_loss.detach())
    for (name, p), (_, q) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert p.grad is not None and q.grad is not None and same(p.grad, q.grad), name
    assert torch.compile(model.features)(tokens_BL)[0].shape == (2, 12, 16)


@pytest.mark.parametrize("head", HEADS)
def test_functional_call_takes_other_weights_and_gives_gradients(head: str) -> None:
    model, other, (tokens_BL, targets_BL) = make(head), make(head), batch()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.1)
    found = functional_call(model, dict(other.named_parameters()), (tokens_BL, targets_BL))
    torch.testing.assert_close(found, other(tokens_BL, targets_BL))
    assert not torch.equal(found, model(tokens_BL, targets_BL))


def test_gradients_by_torch_func_are_those_of_backward_and_by_sample_too() -> None:
    model, (tokens_BL, targets_BL) = make("softmax"), batch()
    parameters = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: dict[str, Tensor], tokens_BL: Tensor, targets_BL: Tensor) -> Tensor:
        logits_BLV = functional_call(model, p, (tokens_BL,))
        return nn.functional.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())

    whole = grad(lambda p: functional_call(model, p, (tokens_BL, targets_BL)))(parameters)
    model(tokens_BL, targets_BL).backward()
    single = vmap(grad(loss), in_dims=(None, 0, 0))(parameters, tokens_BL[:, None], targets_BL[:, None])
    for name, p in model.named_parameters():
        torch.testing.assert_close(whole[name], p.grad, rtol=1e-3, atol=1e-6, msg=name)
        torch.testing.assert_close(single[name].mean(0), p.grad, rtol=1e-3, atol=1e-6, msg=name)


def copies() -> Iterator[Any]:
    def by_torch(model: SequenceModel) -> SequenceModel:
        stored = io.BytesIO()
        torch.save(model, stored)
        stored.seek(0)
        loaded: SequenceModel = torch.load(stored, weights_only=False)
        return loaded

    def by_state(model: SequenceModel) -> SequenceModel:
        fresh = SequenceModel(model.config, seed=9)
        fresh.load_state_dict(model.state_dict())
        return fresh

    yield pytest.param(copy.deepcopy, id="deepcopy")
    yield pytest.param(lambda model: pickle.loads(pickle.dumps(model)), id="pickle")
    yield pytest.param(by_torch, id="torch.save")
    yield pytest.param(by_state, id="state_dict")


@pytest.mark.parametrize("copied", list(copies()))
def test_a_copy_is_the_model_and_lives_on_its_own(copied: Any) -> None:
    trainer, (tokens_BL, targets_BL) = Trainer(make(layers="mamba,attention"), plain()), batch()
    trainer.train_step(tokens_BL, targets_BL)
    other = copied(trainer.model)
    before = trainer.model.scores(tokens_BL)
    assert same(other.scores(tokens_BL), before)
    Trainer(other, plain()).train_step(tokens_BL, targets_BL)
    assert same(trainer.model.scores(tokens_BL), before) and not same(other.scores(tokens_BL), before)


def test_an_average_of_the_weights_is_a_model() -> None:
    trainer, (tokens_BL, targets_BL) = Trainer(make(), plain()), batch()
    average = torch.optim.swa_utils.AveragedModel(
        trainer.model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.5)
    )
    for _ in range(3):
        trainer.train_step(tokens_BL, targets_BL)
        average.update_parameters(trainer.model)
    assert torch.isfinite(average(tokens_BL, targets_BL))
    assert generate(average.module, [[1, 2]], Sampling(max_tokens=2))


@pytest.mark.parametrize(
    "wrap", [nn.DataParallel, lambda model: nn.Sequential(model)], ids=["DataParallel", "Sequential"]
)
def test_a_wrapped_model_is_refused_by_name(wrap: Any) -> None:
    with pytest.raises(TypeError, match="SequenceModel"):
        Trainer(wrap(make()))


def test_half_precision_weights_are_refused_for_training_and_used_otherwise() -> None:
    trainer, (tokens_BL, targets_BL) = Trainer(make(), plain()), batch()
    trainer.model.half()
    with pytest.raises(ConfigError, match=r"float16.*model.float\(\)"):
        trainer.train_step(tokens_BL, targets_BL)
    assert trainer.model.predict(tokens_BL).shape == (2, 12)
    trainer.model.float()
    assert not trainer.train_step(tokens_BL, targets_BL).skipped_update


def test_another_default_dtype() -> None:
    tokens_BL, targets_BL = batch()
    torch.set_default_dtype(torch.float64)
    try:
        model = make()
        loss = Trainer(model, plain()).train_step(tokens_BL, targets_BL).loss
        assert generate(model, [[1, 2, 3]], Sampling(max_tokens=3))
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss == pytest.approx(Trainer(make(), plain()).train_step(tokens_BL, targets_BL).loss, rel=0.5)


def test_inference_mode() -> None:
    model, (tokens_BL, targets_BL) = make(layers="mamba,attention"), batch()
    with torch.inference_mode():
        loss, scores = model(tokens_BL, targets_BL), model(tokens_BL)
        assert generate(model, [[1, 2, 3]], Sampling(max_tokens=3))
    assert torch.isfinite(loss) and scores.shape == (2, 12, 32)
    model(tokens_BL, targets_BL).backward()


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


@pytest.mark.parametrize("what", ["parametrization", "pruning"])
def test_what_a_checkpoint_could_not_build_again_is_refused_by_name_until_it_is_removed(
    what: str, tmp_path: Path
) -> None:
    trainer, (tokens_BL, targets_BL) = Trainer(make(), plain()), batch()
    in_proj = trainer.model.layers[0].mixer.in_proj
    if what == "parametrization":
        parametrize.register_parametrization(in_proj, "weight", Double())
    else:
        prune.random_unstructured(in_proj, "weight", amount=0.5)
    trainer = Trainer(trainer.model, plain())
    trainer.train_step(tokens_BL, targets_BL)
    with pytest.raises(UserError, match=r"layers.0.mixer.in_proj.*remove"):
        trainer.save_checkpoint(tmp_path / "c.safetensors")
    expected = trainer.model.scores(tokens_BL)
    if what == "parametrization":
        parametrize.remove_parametrizations(in_proj, "weight")
    else:
        prune.remove(in_proj, "weight")
    again = Trainer(trainer.model, plain())
    again.save_checkpoint(tmp_path / "c.safetensors")
    torch.testing.assert_close(Trainer.load_checkpoint(tmp_path / "c.safetensors").model.scores(tokens_BL), expected)


class Sharper(SoftmaxHead):
    """One method of ours overridden."""

    def scores(self, z_BLD: Tensor) -> Tensor:
        return -super().scores(z_BLD)


class Reversed(SequenceModel):
    """Features of its own."""

    def features(self, *args: Any, **kwargs: Any) -> Any:
        z_BLD, states = super().features(*args, **kwargs)
        return z_BLD.flip(-1), states


@pytest.mark.parametrize("what", ["head", "model"])
def test_a_class_that_overrides_one_method_decodes_as_it_predicts(what: str) -> None:
    config = ModelConfig(
        vocab_size=32, d_model=16, n_layer=2, head=f"{__name__}:Sharper" if what == "head" else "softmax"
    )
    model = (SequenceModel if what == "head" else Reversed)(config, seed=0).eval()
    ids = [3, 4, 5]
    (found,) = generate(model, [ids], Sampling(max_tokens=6, temperature=0))
    for position in range(6):
        assert found[position] == int(model.predict(torch.tensor([ids + found[:position]]))[0, -1])


@pytest.mark.parametrize("part", ["embedding", "layers.0", "layers.1.mixer", "layers.0.norm", "norm_f"])
def test_generate_obeys_a_hook_on_any_module_that_predict_obeys(part: str) -> None:
    model = make("softmax").eval()
    model.get_submodule(part).register_forward_hook(
        lambda _m, _a, out: (out[0].flip(-1), *out[1:]) if isinstance(out, tuple) else out.flip(-1)
    )
    ids = [3, 4, 5]
    (found,) = generate(model, [ids], Sampling(max_tokens=6, temperature=0))
    for position in range(6):
        assert found[position] == int(model.predict(torch.tensor([ids + found[:position]]))[0, -1])


def test_generate_takes_tensors_and_leaves_modes_as_they_were() -> None:
    model = make(dropout=0.5)
    model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    greedy = Sampling(max_tokens=4, temperature=0)
    lists = generate(model, [[1, 2, 3], [4, 5, 6]], greedy)
    assert generate(model, torch.tensor([[1, 2, 3], [4, 5, 6]]), greedy) == lists
    assert generate(model, [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])], greedy) == lists
    assert [module.training for module in model.modules()] == modes
    with pytest.raises(ConfigError, match=r"expected a tensor \(B, L\)"):
        generate(model, torch.tensor([1, 2, 3]))


@pytest.mark.parametrize("temperature", [1e-46, 5e-324, 1e-38])
def test_the_smallest_temperatures_are_greedy(temperature: float) -> None:
    cold = Sampling(max_tokens=8, temperature=temperature)
    assert generate(make(), [[1, 2, 3]], cold) == generate(make(), [[1, 2, 3]], cold.replace(temperature=0))
