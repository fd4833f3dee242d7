"""The Trainer: accumulation, clipping, the guard against NaN and Inf, evaluation, saving and loading."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer, UserError
from protomamba.train.trainer import MAX_SKIPPED_IN_A_ROW, NonFiniteError, renamed_layers

PLAIN = {"bp_cadence_steps": 1, "ff_lr": 0.0, "lr": 1e-2}


def make(head: str = "hpn", **fields: object) -> Trainer:
    model = SequenceModel(ModelConfig(vocab_size=17, d_model=8, d_state=4, n_layer=2, head=head), seed=5)
    return Trainer(model, TrainConfig(**{**PLAIN, **fields}))


def batch(seed: int = 0, rows: int = 4, length: int = 12) -> tuple[Tensor, Tensor, None]:
    tokens_BL = torch.randint(0, 17, (rows, length + 1), generator=torch.Generator().manual_seed(seed))
    return tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous(), None


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_it_learns_a_pattern() -> None:
    trainer = make()
    tokens_BL = (torch.arange(16)[None] + torch.arange(4)[:, None]) % 17
    first = trainer.train_step(tokens_BL, (tokens_BL + 1) % 17).loss
    for _ in range(60):
        stats = trainer.train_step(tokens_BL, (tokens_BL + 1) % 17)
    assert stats.loss < 0.2 * first and stats.step == 61
    assert trainer.evaluate([(tokens_BL, (tokens_BL + 1) % 17, None)]).accuracy > 0.9


def test_accumulated_micro_batches_are_one_batch_whatever_their_valid_targets() -> None:
    tokens_BL, targets_BL, _ = batch()
    targets_BL[0, 3:] = -100
    one, many = make(), make()
    whole = one.train_step(tokens_BL, targets_BL)
    parts = many.train_step(*[(tokens_BL[:1], targets_BL[:1], None), (tokens_BL[1:], targets_BL[1:], None)])
    assert parts.loss == pytest.approx(whole.loss, rel=1e-5) and parts.tokens == whole.tokens
    assert parts.grad_norm == pytest.approx(whole.grad_norm, rel=1e-4)


def test_clipping_bounds_the_norm_that_is_reported_before_it() -> None:
    trainer = make(grad_clip_norm=1e-3)
    stats = trainer.train_step(*batch())
    assert stats.clipped and stats.grad_norm is not None and stats.grad_norm > 1e-3
    first = [slots["exp_avg"] / (1 - 0.9) for slots in trainer.optimizer.state().values()]
    norm = math.sqrt(sum(float(g.square().sum()) for g in first))
    assert norm == pytest.approx(1e-3, rel=1e-4)
    assert not make(grad_clip_norm=1e6).train_step(*batch()).clipped


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["weight", "embedding of an unused token", "gradient", "exp_avg", "exp_avg_sq"])
def test_nan_and_inf_anywhere_skip_the_update_and_poison_nothing(where: str, bad: float) -> None:
    trainer = make()
    tokens_BL, targets_BL, _ = batch()
    tokens_BL[tokens_BL == 16] = 0
    trainer.train_step(tokens_BL, targets_BL)
    poisoned = trainer.model.layers[0].mixer.in_proj.weight
    if where == "weight":
        poisoned.data[0, 0] = bad
    elif where.startswith("embedding"):
        trainer.model.embedding.weight.data[16, 0] = bad
    elif where == "gradient":
        poisoned.register_hook(lambda gradient: gradient * bad)
    else:
        trainer.optimizer.state()["layers.0.mixer.in_proj.weight"][where][0, 0] = bad
    before = weights(trainer)
    moments = {n: {k: v.clone() for k, v in m.items()} for n, m in trainer.optimizer.state().items()}
    stats = trainer.train_step(tokens_BL, targets_BL)
    assert stats.skipped_update and trainer.skipped_total == 1 and trainer.skipped_in_row == 1
    for name, tensor in weights(trainer).items():
        assert torch.equal(tensor.nan_to_num(), before[name].nan_to_num()), name
    for name, slots in trainer.optimizer.state().items():
        assert all(torch.equal(slots[k].nan_to_num(), moments[name][k].nan_to_num()) for k in slots), name


@pytest.mark.parametrize("clip", [0.0, 1.0])
def test_finite_gradients_whose_squares_overflow_are_skipped_too(clip: float) -> None:
    trainer = make(grad_clip_norm=clip)
    trainer.train_step(*batch())
    hook = trainer.model.layers[0].mixer.in_proj.weight.register_hook(lambda gradient: gradient * 1e25)
    before = weights(trainer)
    assert trainer.train_step(*batch(1)).skipped_update
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(trainer).items())
    hook.remove()
    assert not trainer.train_step(*batch(2)).skipped_update


def test_fail_on_non_finite_names_the_first_tensor() -> None:
    trainer = make(fail_on_non_finite=True)
    trainer.model.layers[1].mixer.A_log.data[2, 1] = math.nan
    with pytest.raises(NonFiniteError, match=r"step 1: NaN or Inf in layers\.1\.mixer\.A_log"):
        trainer.train_step(*batch())


def test_ten_skipped_updates_in_a_row_stop_with_advice() -> None:
    trainer = make()
    trainer.model.norm_f.weight.data[0] = math.nan
    for _ in range(MAX_SKIPPED_IN_A_ROW - 1):
        assert trainer.train_step(*batch()).skipped_update
    with pytest.raises(NonFiniteError, match=r"norm_f\.weight, 10 updates in a row skipped; lower --lr"):
        trainer.train_step(*batch())


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_evaluate_weighs_by_targets_and_changes_no_weight(head: str) -> None:
    trainer = make(head)
    before = weights(trainer)
    parts = [batch(0, rows=3), batch(1, rows=1)]
    joined = (torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]), None)
    one, many = trainer.evaluate([joined]), trainer.evaluate(parts)
    assert one.targets == many.targets == 48
    assert one.loss == pytest.approx(many.loss, rel=1e-5) and one.accuracy == many.accuracy
    assert trainer.model.training
    calibrated = trainer.evaluate(parts, calibrate=True)
    assert calibrated.perplexity is not None and many.perplexity is not None
    assert calibrated.perplexity <= many.perplexity * (1 + 1e-6)
    assert all(torch.equal(weights(trainer)[n], before[n]) for n in before)


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_a_loaded_trainer_goes_on_to_the_bit(head: str, tmp_path: Path) -> None:
    def run(trainer: Trainer, start: int, stop: int) -> list[float]:
        return [trainer.train_step(*batch(seed)).loss for seed in range(start, stop)]

    fields = {"bp_cadence_steps": 2, "ff_lr": 1e-2, "grad_clip_norm": 0.5, "steps": 12}
    straight = make(head, **fields)
    straight.freeze("first:1")
    losses = run(straight, 0, 12)
    cut = make(head, **fields)
    cut.freeze("first:1")
    found = run(cut, 0, 5)
    cut.save_checkpoint(tmp_path / "c.safetensors")
    again = Trainer.load_checkpoint(tmp_path / "c.safetensors")
    found += run(again, 5, 12)
    assert found == losses and again.global_step == 12 and again.tokens_seen == straight.tokens_seen
    for name, tensor in weights(straight).items():
        assert torch.equal(weights(again)[name], tensor), name
    for name, slots in straight.optimizer.state().items():
        assert all(torch.equal(slots[k], again.optimizer.state()[name][k]) for k in slots), name


def test_growing_keeps_the_moments_of_the_old_layers_under_their_new_names() -> None:
    trainer = make()
    trainer.train_step(*batch())
    old = {n: {k: v.clone() for k, v in m.items()} for n, m in trainer.optimizer.state().items()}
    trainer.grow(4, "specific:0,2")
    moments = trainer.optimizer.state()
    for name, slots in renamed_layers(old, [None, 0, None, 1]).items():
        assert all(torch.equal(slots[k], moments[name][k]) for k in slots), name
    assert not any(name.startswith(("layers.0.", "layers.2.")) for name in moments)
    trainer.train_step(*batch(1))
    trainer.train_step(*batch(2))
    steps = {n: int(m["step"]) for n, m in trainer.optimizer.state().items()}
    assert steps["layers.0.mixer.out_proj.weight"] == 2 and steps["layers.1.mixer.out_proj.weight"] == 3


def test_a_model_grown_behind_its_trainer_is_refused_with_what_to_do() -> None:
    trainer = make()
    trainer.model.grow(4)
    told = r"layers\.\d.* is trainable, but was not when this Trainer was made: grow and freeze with Trainer.grow"
    with pytest.raises(UserError, match=told):
        trainer.train_step(*batch())


def test_a_parameter_that_a_forward_pass_makes_is_refused_not_left_untrained() -> None:
    trainer = make()

    def gain(module: torch.nn.Module, given: object, output: Tensor) -> Tensor:
        if not hasattr(module, "gain"):
            module.gain = torch.nn.Parameter(torch.ones(()))
        return output * module.gain

    trainer.model.norm_f.register_forward_hook(gain)
    with pytest.raises(UserError, match=r"norm_f\.gain is trainable, but was not when this Trainer was made"):
        trainer.train_step(*batch())


def test_the_library_example_of_the_readme() -> None:
    from protomamba import batch_from_tokens

    model = SequenceModel(ModelConfig(vocab_size=64, d_model=16, d_state=16, d_conv=4, n_layer=2))
    model.grow(6, "specific:1,3,4,5")
    model.freeze("first:2")
    trainer = Trainer(model, TrainConfig(lr=1e-4))
    ids, targets = batch_from_tokens(list(range(64)), cursor=0, batch_size=8, seq_len=64)
    assert math.isfinite(trainer.train_step(ids, targets).loss)


def test_a_batch_without_a_target_moves_nothing() -> None:
    trainer = make()
    trainer.train_step(*batch())
    before = weights(trainer)
    tokens_BL, targets_BL, _ = batch(1)
    stats = trainer.train_step(tokens_BL, torch.full_like(targets_BL, -100))
    assert stats.loss == 0 and stats.step == 2
    assert all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())


def test_what_was_frozen_by_hand_stays_so(tmp_path: Path) -> None:
    trainer = make()
    trainer.model.head.requires_grad_(False)
    trainer.model.layers[1].norm.weight.requires_grad_(False)
    trainer.save_checkpoint(tmp_path / "c.safetensors")
    again = Trainer.load_checkpoint(tmp_path / "c.safetensors")
    moving = [{n for n, p in t.model.named_parameters() if p.requires_grad} for t in (trainer, again)]
    assert moving[0] == moving[1] and "head.prototypes" not in moving[0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_model_of_another_dtype_trains_and_comes_back_as_it_was(dtype: torch.dtype, tmp_path: Path) -> None:
    trainer = make()
    trainer.model.to(dtype)
    straight = Trainer(trainer.model, TrainConfig(**{**PLAIN, "ff_lr": 1e-3}))
    straight.train_step(*batch())
    straight.save_checkpoint(tmp_path / "c.safetensors")
    again = Trainer.load_checkpoint(tmp_path / "c.safetensors")
    for each in (straight, again):
        each.train_step(*batch(1))
    for (name, a), b in zip(straight.model.named_parameters(), again.model.parameters(), strict=True):
        assert a.dtype == b.dtype == dtype and torch.equal(a, b), name


def test_batches_without_a_target_say_nothing_of_perplexity() -> None:
    tokens_BL, targets_BL, _ = batch()
    nothing = tokens_BL, torch.full_like(targets_BL, -100), None
    trainer = make("softmax")
    whole = trainer.evaluate([(tokens_BL, targets_BL, None)])
    assert trainer.evaluate([nothing]).perplexity is None
    assert trainer.evaluate([nothing, (tokens_BL, targets_BL, None)]).perplexity == whole.perplexity
