"""A trainer's steps: the same weights, moments, losses and norms on any number of ranks that share out the shards."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.errors import ConfigError
from protomamba.model.heads.sampling_head import GROUP, Sample, SamplingHead
from protomamba.train.comm import Comm, Local
from tests.distributed.threads import agreed, ranks
from tests.marks import slow
from tests.runs import assert_equal

SHARDS, ROWS, LENGTH, VOCAB = 8, 9, 12, 1_200
SETTINGS = {
    **{"steps": 12, "grad_shards": SHARDS, "lr": 1e-2, "ff_lr": 1e-2, "grad_clip_norm": 0.05, "seed": 3},
    **{"lr_warmup_steps": 0, "bp_cadence_steps": 1},
}


def model(head: str = "hpn") -> SequenceModel:
    shape = {"d_model": 40, "d_state": 4, "n_layer": 2, "vocab_size": VOCAB, "head": head}
    return SequenceModel(ModelConfig(**shape), seed=1)


def batches(step: int, count: int = 2) -> list[tuple[Tensor, Tensor]]:
    """Micro-batches of which some rows hold few targets, and one none."""
    draw = torch.Generator().manual_seed(step)
    found = []
    for _ in range(count):
        tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=draw)
        targets = tokens[:, 1:].clone()
        targets[torch.rand(targets.shape, generator=draw) < 0.3] = -100
        targets[step % ROWS] = -100
        found.append((tokens[:, :-1], targets))
    return found


def long_batches(step: int) -> list[tuple[Tensor, Tensor]]:
    """More targets for each of two shards than share a sample of classes, and a shard with more than the other."""
    tokens = torch.randint(VOCAB, (2, GROUP + 9), generator=torch.Generator().manual_seed(step))
    targets = tokens[:, 1:].clone()
    targets[step % 2, GROUP // 3 :: 2] = -100
    return [(tokens[:, :-1], targets), (tokens[:, :-1].flip(0), tokens[:, 1:].flip(0))]


def steps(
    comm: Comm, made: SequenceModel, first: int, last: int, state: Any, settings: dict[str, Any]
) -> tuple[Any, Any]:
    """The trainer's parts after these steps, starting from a state, and what each step told."""
    trainer = Trainer(made, TrainConfig(**settings), comm)
    if state is not None:
        trainer.model.load_state_dict(state["model"])
        trainer.load_slots(state["optimizer"]["moments"])
        trainer.load_state_dict(state["trainer"])
    told = [trainer.train_step(*batches(step)) for step in range(first, last)]
    parts = trainer.parts()
    # Threads share torch's generator: what is drawn from it is tested with processes.
    kept = {name: copy.deepcopy(dict(parts[name])) for name in ("model", "optimizer", "trainer")}
    return kept, told


def on(world: int, first: int, last: int, state: Any, head: str, settings: dict[str, Any]) -> tuple[Any, Any]:
    """The same on several ranks, of which rank 0 has the whole state."""
    models = [model(head) for _ in range(world)]
    return agreed(models, lambda comm, made: steps(comm, made, first, last, state, settings))


@pytest.mark.parametrize("head", ["hpn", "softmax"])
def test_any_number_of_ranks_makes_the_same_steps(head: str) -> None:
    straight, told = on(1, 0, 4, None, head, SETTINGS)
    assert any(each.clipped for each in told)
    for world in (3, 8):
        parts, again = on(world, 0, 4, None, head, SETTINGS)
        assert_equal(parts, straight, f"{world} ranks")
        assert again == told


def test_a_run_goes_on_with_another_number_of_ranks() -> None:
    straight, told = on(1, 0, 6, None, "hpn", SETTINGS)
    state, again = on(3, 0, 2, None, "hpn", SETTINGS)
    for world, first, last in ((8, 2, 3), (1, 3, 4), (4, 4, 6)):
        state, more = on(world, first, last, state, "hpn", SETTINGS)
        again += more
    assert_equal(state, straight, "parts")
    assert again == told


def test_row_sparse_tables_make_the_same_steps_on_any_number_of_ranks() -> None:
    """Embedding and prototypes, shards without a target, cuts, and another number of ranks after each."""
    settings = {**SETTINGS, "sparse_rows": True}
    straight, told = on(1, 0, 4, None, "hpn", settings)
    assert {"touched", "shrunk"} <= straight["optimizer"]["moments"]["head.prototypes"].keys()
    state, again = on(3, 0, 2, None, "hpn", settings)
    for world, first, last in ((8, 2, 3), (1, 3, 4)):
        state, more = on(world, first, last, state, "hpn", settings)
        again += more
    assert_equal(state, straight, "parts")
    assert again == told


def test_shards_of_row_sparse_tables_add_up_to_the_gradient_of_one() -> None:
    """The first step of one shard and of eight: another order of the same sums."""
    (whole, _), (shards, _) = (
        on(1, 0, 1, None, "softmax", {**SETTINGS, "sparse_rows": True, "ff_lr": 0.0, "grad_shards": count})
        for count in (1, SHARDS)
    )
    for name, value in whole["model"].items():
        torch.testing.assert_close(shards["model"][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_shards_with_several_samples_of_classes_make_the_same_steps_on_one_and_two_ranks() -> None:
    """Each 512 targets of a shard have a sample of their own (decision 092), beside those of the other shard."""
    small = ModelConfig(d_model=16, d_state=4, n_layer=1, vocab_size=VOCAB, head="hpn")
    settings = TrainConfig(**{**SETTINGS, "grad_shards": 2})

    def trained(comm: Comm, made: SequenceModel) -> tuple[Any, Any]:
        assert isinstance(made.head, SamplingHead)
        trainer, drawn = Trainer(made, settings, comm), list[int]()
        made.head.next_samples = counted(made.head.next_samples, drawn)  # type: ignore[method-assign]
        told = [trainer.train_step(*long_batches(step)) for step in range(3)]
        assert set(drawn) == {1, 2}
        parts = trainer.parts()
        return {name: copy.deepcopy(dict(parts[name])) for name in ("model", "optimizer", "trainer")}, told

    straight, told = agreed([SequenceModel(small, seed=1)], trained)
    parts, again = agreed([SequenceModel(small, seed=1) for _ in range(2)], trained)
    assert_equal(parts, straight, "2 ranks")
    assert again == told


def counted(draw: Callable[..., list[Sample]], numbers: list[int]) -> Callable[..., list[Sample]]:
    """The same, noting how many samples it draws."""

    def noting(*given: Tensor) -> list[Sample]:
        samples = draw(*given)
        numbers.append(len(samples))
        return samples

    return noting


PLANS = [plan if plan < 3 else slow(plan) for plan in range(200)]


@pytest.mark.parametrize("plan", PLANS)
def test_random_settings_with_cuts(plan: int) -> None:
    draw = random.Random(plan)
    shards = draw.randint(1, ROWS)
    settings = {
        **SETTINGS,
        **{"grad_shards": shards, "grad_clip_norm": draw.choice([0.0, 0.05]), "ff_lr": draw.choice([0.0, 1e-2])},
        **{"bp_cadence_steps": draw.choice([1, 2]), "weight_decay": draw.choice([0.0, 0.3])},
    }
    head = draw.choice(["hpn", "softmax"])
    straight, told = on(1, 0, 4, None, head, settings)
    cut = draw.randint(1, 3)
    state, again = on(draw.randint(1, shards), 0, cut, None, head, settings)
    state, more = on(draw.randint(1, shards), cut, 4, state, head, settings)
    assert_equal(state, straight, "parts")
    assert again + more == told


def test_the_moments_are_shared_out() -> None:
    models = [model() for _ in range(4)]

    def held(comm: Comm) -> int:
        trainer = Trainer(models[comm.rank], TrainConfig(**SETTINGS), comm)
        trainer.train_step(*batches(0))
        return sum(x.numel() for slots in trainer.optimizer.state().values() for x in slots.values())

    whole = held(Local())
    parts = ranks(4, held)
    assert max(parts) < 0.45 * whole


def test_eight_shards_are_one_to_rounding() -> None:
    one, _ = on(1, 0, 1, None, "softmax", {**SETTINGS, "grad_shards": 1, "ff_lr": 0.0})
    eight, _ = on(1, 0, 1, None, "softmax", {**SETTINGS, "ff_lr": 0.0})
    for name, slots in one["optimizer"]["moments"].items():
        torch.testing.assert_close(
            slots["exp_avg"], eight["optimizer"]["moments"][name]["exp_avg"], rtol=2e-4, atol=1e-9
        )


def test_a_non_finite_number_is_seen_by_all() -> None:
    models = [model() for _ in range(3)]

    def skip(comm: Comm) -> tuple[bool, int]:
        trainer = Trainer(models[comm.rank], TrainConfig(**SETTINGS), comm)
        trainer.train_step(*batches(0))
        if comm.rank == comm.world - 1:  # in a piece that only this rank owns
            name = list(trainer.optimizer.state())[-1]
            trainer.optimizer.state()[name]["exp_avg"].view(-1)[0] = float("nan")
        return trainer.train_step(*batches(1)).skipped_update, trainer.skipped_total

    assert ranks(3, skip) == [(True, 1)] * 3


def test_more_shards_than_rows_are_refused_by_name() -> None:
    trainer = Trainer(model(), TrainConfig(**{**SETTINGS, "grad_shards": ROWS + 1}))
    with pytest.raises(ConfigError, match=r"--grad-shards 10: a micro-batch of 9 rows"):
        trainer.train_step(*batches(0))
