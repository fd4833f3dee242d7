"""Promise 6: NaN or Inf anywhere is met at that step, the update skipped, and nothing that is kept is poisoned."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.train.trainer import NonFiniteError
from tests.marks import slow
from tests.reliability.promises import Trials

PLACES = ("weight", "sample", "gradient", "exp_avg", "exp_avg_sq")
KINDS = (math.nan, math.inf, -math.inf)


def build(rng: random.Random, **fields: object) -> Trainer:
    model = SequenceModel(
        ModelConfig(
            vocab_size=11,
            d_model=8,
            d_state=rng.choice([1, 4]),
            n_layer=2,
            head=rng.choice(["hpn", "softmax"]),
            layer=rng.choice(["mamba", "compact"]),
        ),
        seed=rng.randrange(1000),
    )
    model.freeze(rng.choice(["none", "first:1"]))
    values = {"bp_cadence_steps": 1, "ff_lr": rng.choice([0.0, 1e-2]), "grad_clip_norm": rng.choice([0.0, 0.5])}
    return Trainer(model, TrainConfig(**{**values, **fields}))


def batch(rng: random.Random) -> tuple[Tensor, Tensor]:
    tokens_BL = torch.randint(0, 11, (2, 9), generator=torch.Generator().manual_seed(rng.randrange(10**6)))
    return tokens_BL[:, :-1].contiguous(), tokens_BL[:, 1:].contiguous()


def kept(trainer: Trainer) -> dict[str, Tensor]:
    """All that an update changes, by name, copied."""
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moments = trainer.optimizer.state()
    return weights | {f"{n} {k}": t.clone() for n, slots in moments.items() for k, t in slots.items()}


def poison(
    trainer: Trainer, place: str, bad: float, tokens_BL: Tensor, rng: random.Random
) -> tuple[str, Callable[[], None]]:
    """Put `bad` at a random element of that kind; the parameter's name, and what takes it away again."""
    named = {n: p for n, p in trainer.model.named_parameters() if p.requires_grad or place == "weight"}
    if place == "gradient":
        named = {n: p for n, p in named.items() if p.requires_grad}
    name = "embedding.weight" if place == "sample" else rng.choice(sorted(named))
    tensor = dict(trainer.model.named_parameters())[name]
    if place == "gradient":

        def spoil(gradient: Tensor) -> Tensor:
            spoilt = gradient.clone()
            spoilt.view(-1)[element] = bad
            return spoilt

        element = rng.randrange(tensor.numel())
        return name, tensor.register_hook(spoil).remove
    if place in ("exp_avg", "exp_avg_sq"):
        target = trainer.optimizer.state()[name][place]
    else:
        target = tensor.data
    row = int(tokens_BL.view(-1)[rng.randrange(tokens_BL.numel())]) * 8 if place == "sample" else 0
    element = row + rng.randrange(8) if place == "sample" else rng.randrange(target.numel())
    before = float(target.view(-1)[element])
    target.view(-1)[element] = bad

    def mend() -> None:
        target.view(-1)[element] = before

    return name, mend


def one_trial(rng: random.Random) -> str | None:
    trainer, place, bad = build(rng), rng.choice(PLACES), rng.choice(KINDS)
    trainer.train_step(*batch(rng))
    tokens_BL, targets_BL = batch(rng)
    name, mend = poison(trainer, place, bad, tokens_BL, rng)
    before = kept(trainer)
    stats = trainer.train_step(tokens_BL, targets_BL)
    after = kept(trainer)
    mend()
    case = f"{bad} in {place} of {name}"
    if not stats.skipped_update or trainer.skipped_total != 1:
        return f"{case}: not met"
    changed = [n for n in before if not torch.equal(before[n].view(torch.int32), after[n].view(torch.int32))]
    if changed:
        return f"{case}: changed {changed}"
    mended = trainer.train_step(tokens_BL, targets_BL)
    whole = all(bool(tensor.isfinite().all()) for tensor in kept(trainer).values())
    return None if whole and not mended.skipped_update and math.isfinite(mended.loss) else f"{case}: not over"


@pytest.mark.parametrize("count", [60, slow(3000)])
def test_anything_anywhere_is_skipped_and_over_when_it_is_gone(count: int, trials: Callable[[int], Trials]) -> None:
    counted, rng = trials(6), random.Random(count)
    for _ in range(count):
        counted.add(one_trial(rng))
    counted.finish()


@pytest.mark.parametrize("count", [20, slow(500)])
def test_asked_to_fail_it_names_the_tensor(count: int, trials: Callable[[int], Trials]) -> None:
    counted, rng = trials(6), random.Random(count)
    for _ in range(count):
        trainer, place = build(rng, fail_on_non_finite=True), rng.choice(PLACES)
        trainer.train_step(*batch(rng))
        tokens_BL, targets_BL = batch(rng)
        name, _ = poison(trainer, place, rng.choice(KINDS), tokens_BL, rng)
        try:
            trainer.train_step(tokens_BL, targets_BL)
            counted.add(f"{place} of {name}: went on")
        except NonFiniteError as error:
            # A bad gradient of one parameter is met there; nothing before it in the model's order is bad.
            counted.add(None if f"step 2: NaN or Inf in {name}" in str(error) else f"{place} of {name}: {error}")
    counted.finish()


def test_a_sample_that_makes_the_loss_infinite_between_backpropagations(trials: Callable[[int], Trials]) -> None:
    """A step of local updates only: what the sample's embedding spoils is met there as well."""
    counted, rng = trials(6), random.Random(0)
    for bad in KINDS:
        trainer = build(rng, bp_cadence_steps=50, ff_lr=1e-2)
        tokens_BL, targets_BL = batch(rng)
        trainer.train_step(tokens_BL, targets_BL)
        poison(trainer, "sample", bad, tokens_BL, rng)
        before = kept(trainer)
        stats = trainer.train_step(tokens_BL, targets_BL)
        same = all(torch.equal(before[n].view(torch.int32), t.view(torch.int32)) for n, t in kept(trainer).items())
        counted.add(None if stats.skipped_update and same else f"{bad}: {stats}")
    counted.finish()
