"""Workers that meet now and then: the same bits on any number of ranks and after any cut."""

from __future__ import annotations

import copy
from typing import Any

import torch

from protomamba import TrainConfig
from protomamba.checkpoint.file import Checkpoint
from protomamba.train.comm import Comm, Local
from protomamba.train.outer import OUTER_MOMENTUM, OUTER_RATE, OuterTrainer
from tests.distributed.test_trainer import batches, model
from tests.distributed.threads import ranks
from tests.runs import assert_equal

SETTINGS = {"steps": 8, "grad_shards": 4, "sync_every": 3, "lr": 1e-2, "lr_warmup_steps": 0, "seed": 3}


def steps(comm: Comm, made: Any, first: int, last: int, state: Any) -> tuple[Any, Any]:
    trainer = OuterTrainer(made, TrainConfig(**SETTINGS), comm)
    if state is not None:
        rng = {"torch": torch.get_rng_state()}
        trainer.restore(Checkpoint(parts={**state, "rng": rng}, config=trainer.configs(), info={}, version=2))
    told = [trainer.train_step(*batches(step)) for step in range(first, last)]
    parts = trainer.parts()
    return {n: copy.deepcopy(dict(parts[n])) for n in ("model", "optimizer", "trainer", "workers")}, told


def on(world: int, first: int, last: int, state: Any) -> tuple[Any, Any]:
    models = [model() for _ in range(world)]
    if world == 1:
        return steps(Local(), models[0], first, last, state)
    return ranks(world, lambda comm: steps(comm, models[comm.rank], first, last, state))[0]


def test_any_number_of_ranks_and_any_cut() -> None:
    straight, told = on(1, 0, 8, None)
    for world, cut in ((2, 4), (4, 6), (3, 1)):
        state, again = on(world, 0, cut, None)
        state, more = on(1 if world == 3 else 3, cut, 8, state)
        assert_equal(state, straight, f"{world} ranks, cut at {cut}")
        assert again + more == told


def test_a_meeting_is_one_nesterov_step_on_the_mean_of_what_was_moved() -> None:
    trainer = OuterTrainer(model("softmax"), TrainConfig(**SETTINGS))
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    for step in range(2):
        trainer.train_step(*batches(step))
    assert_equal({name: p.detach() for name, p in trainer.model.named_parameters()}, before, "before the meeting")
    moved = {}
    trainer._meet, meet = (lambda: None), trainer._meet  # type: ignore[method-assign]
    trainer.train_step(*batches(2))
    for name, weight in before.items():
        moved[name] = sum(weight - w.model.get_parameter(name).detach() for w in trainer.workers.values()) / 4
    meet()
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] - OUTER_RATE * (1 + OUTER_MOMENTUM) * moved[name])
