"""Workers that meet now and then: the same bits on any number of ranks and after any cut."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from protomamba import TrainConfig, Trainer
from protomamba.checkpoint.file import Checkpoint
from protomamba.errors import ConfigError
from protomamba.run_config import RunConfig
from protomamba.train.comm import Comm, Local
from protomamba.train.comm_start import refuse_unshareable
from protomamba.train.comm_workers import gradient_shards, led, members
from protomamba.train.outer import OUTER_MOMENTUM, OUTER_RATE, OuterTrainer
from tests.distributed.test_trainer import batches, model
from tests.distributed.threads import agreed
from tests.runs import assert_equal

SETTINGS = {"steps": 5, "grad_shards": 4, "sync_every": 2, "lr": 1e-2, "lr_warmup_steps": 0, "seed": 3}


def steps(comm: Comm, made: Any, first: int, last: int, state: Any, workers: int | None) -> tuple[Any, Any]:
    trainer = OuterTrainer(made, TrainConfig(**SETTINGS, workers_outer=workers), comm)
    if state is not None:
        rng = {"torch": torch.get_rng_state()}
        trainer.restore(Checkpoint(parts={**state, "rng": rng}, config=trainer.configs(), info={}, version=2))
    told = [trainer.train_step(*batches(step)) for step in range(first, last)]
    parts = trainer.parts()
    return {n: copy.deepcopy(dict(parts[n])) for n in ("model", "optimizer", "trainer", "workers")}, told


def on(world: int, first: int, last: int, state: Any, workers: int | None = None) -> tuple[Any, Any]:
    """The same on several ranks; the weights are those of the last meeting."""
    return agreed([model() for _ in range(world)], lambda comm, made: steps(comm, made, first, last, state, workers))


# Of 2 workers on 3 ranks the middle one has a part of each; on 4 ranks two have no worker to speak for.
@pytest.mark.parametrize(("workers", "world", "then"), [(None, 3, 2), (2, 3, 4)])
def test_any_number_of_ranks_and_any_cut(workers: int | None, world: int, then: int) -> None:
    straight, told = on(1, 0, 5, None, workers)
    assert len(straight["workers"]) == (workers or 4)
    state, again = on(world, 0, 3, None, workers)
    state, more = on(then, 3, 5, state, workers)
    assert_equal(state, straight, f"{world} ranks, then {then}")
    assert again + more == told


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_number_of_workers_on_every_number_of_ranks(workers: int, world: int) -> None:
    straight, told = on(1, 0, 5, None, workers)
    for cut in range(1, 5):
        state, again = on(world, 0, cut, None, workers)
        state, more = on(5 - world, cut, 5, state, workers)
        assert_equal(state, straight, f"{world} ranks, cut at {cut}")
        assert again + more == told


@torch.no_grad()
def set_alike(layer: torch.nn.Module) -> None:
    """Ranks are threads here, which share one stream of random numbers: what each drew for it is left to luck."""
    for number, parameter in enumerate(layer.parameters()):
        drawn = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(number))
        parameter.copy_(0.1 * drawn)


def grown_and_frozen(comm: Comm, made: Any) -> Any:
    """Three steps, of which the workers have met after two; then a third layer, and the first one stays as it is."""
    trainer = OuterTrainer(made, TrainConfig(**SETTINGS), comm)
    for step in range(3):
        trainer.train_step(*batches(step))
    trainer.grow(3, seed=5)
    for each in (trainer, *trainer.workers.values()):
        set_alike(each.model.layers[2])
    trainer.freeze("first:1")
    before = copy.deepcopy(trainer.model.layers[0].state_dict())
    told = [trainer.train_step(*batches(step)) for step in range(3, 5)]
    for worker in trainer.workers.values():
        assert_equal(worker.model.layers[0].state_dict(), before, "the frozen layer of a worker")
        assert_equal(
            worker.model.layers[2].state_dict(), trainer.model.layers[2].state_dict(), "the new one, after a meeting"
        )
    assert_equal(trainer.model.layers[0].state_dict(), before, "the frozen layer")
    parts = trainer.parts()
    return {n: copy.deepcopy(dict(parts[n])) for n in ("model", "optimizer", "workers")}, told


def test_workers_grow_and_freeze_with_the_model() -> None:
    """They did not: the new layer was never trained, and what was frozen went on."""
    straight, told = agreed([model()], grown_and_frozen)
    again, more = agreed([model() for _ in range(3)], grown_and_frozen)
    assert_equal(again, straight, "3 ranks")
    assert more == told


def test_growing_behind_the_last_step_moves_no_weight() -> None:
    """The workers met after it, at the run's end; growing made them meet again, by momentum alone."""
    trainer = OuterTrainer(model(), TrainConfig(**SETTINGS))
    for step in range(5):
        trainer.train_step(*batches(step))
    before = copy.deepcopy(trainer.model.layers[:2].state_dict())
    trainer.grow(3, seed=5)
    assert_equal(trainer.model.layers[:2].state_dict(), before, "the layers there were")


def test_growing_before_further_steps_moves_no_weight() -> None:
    """The workers had met at what was the run's end, which `further` moves: they met once more, by momentum alone."""
    trainer = OuterTrainer(model(), TrainConfig(**SETTINGS))
    for step in range(5):
        trainer.train_step(*batches(step))
    before = copy.deepcopy(trainer.model.layers[:2].state_dict())
    trainer.further(4)
    trainer.grow(3, seed=5)
    assert_equal(trainer.model.layers[:2].state_dict(), before, "the layers there were")


def test_one_worker_is_a_shared_run_between_the_meetings() -> None:
    """What a worker of several shards does in its steps is what a trainer of as many shards does."""
    alone = Trainer(model("softmax"), TrainConfig(**{**SETTINGS, "sync_every": None}))
    outer = OuterTrainer(model("softmax"), TrainConfig(**{**SETTINGS, "sync_every": 5}, workers_outer=1))
    for step in range(3):
        assert outer.train_step(*batches(step)).loss == alone.train_step(*batches(step)).loss
    assert_equal(outer.workers[0].model.state_dict(), alone.model.state_dict(), "weights")


def test_the_shards_of_each_worker_and_who_has_them() -> None:
    assert [members(worker, 2, 8, 3) for worker in range(2)] == [
        {0: range(0, 3), 1: range(3, 4)},
        {1: range(0, 2), 2: range(2, 4)},
    ]
    assert led(2, 8, 3) == [range(0, 1), range(1, 2), range(0)]
    assert led(8, 8, 3) == [range(0, 3), range(3, 6), range(6, 8)]


def test_shards_follow_the_workers_where_they_are_not_given() -> None:
    assert [gradient_shards(TrainConfig(workers_outer=4), world) for world in (1, 4, 5)] == [4, 4, 8]
    assert gradient_shards(TrainConfig(workers_outer=4, grad_shards=12), 2) == 12


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sync_every": 2, "workers_outer": 3, "grad_shards": 4}, "--workers-outer 3: does not divide --grad-shards 4"),
        ({"workers_outer": 2}, "--workers-outer 2: workers synchronise every --sync-every steps"),
    ],
)
def test_workers_that_cannot_be_are_refused_by_name(settings: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        refuse_unshareable(RunConfig(batch_size=8, **settings), Local())


def test_a_meeting_is_one_nesterov_step_on_the_mean_of_what_was_moved() -> None:
    trainer = OuterTrainer(model("softmax"), TrainConfig(**SETTINGS))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train_step(*batches(0))
    assert_equal({name: p.detach() for name, p in trainer.model.named_parameters()}, before, "before the meeting")
    moved = {}
    trainer._meet, meet = (lambda: None), trainer._meet  # type: ignore[method-assign]
    trainer.train_step(*batches(1))
    for name, weight in before.items():
        moved[name] = sum(weight - w.model.get_parameter(name).detach() for w in trainer.workers.values()) / 4
    meet()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - OUTER_RATE * (1 + OUTER_MOMENTUM) * moved[name])
