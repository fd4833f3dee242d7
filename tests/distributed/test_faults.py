"""What the ranks do when one of them fails, with threads as ranks; test_runs.py has it with processes."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from protomamba import TrainConfig, Trainer
from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import RunDir
from protomamba.data.dataset_stream import DatasetStream
from protomamba.errors import UserError
from protomamba.run_config import RunConfig
from protomamba.storage import Disk, SaveError
from protomamba.train.build import build_parts
from protomamba.train.comm import Comm
from protomamba.train.comm_watch import RankFailed
from protomamba.train.outer import OuterTrainer
from protomamba.train.run import Run
from protomamba.train.signals import StopRequest
from protomamba.train.trainer import NonFiniteError
from tests import runs
from tests.distributed.test_trainer import SETTINGS, batches, model
from tests.distributed.threads import outcomes, ranks

WORLD = 3


def stream() -> DatasetStream:
    ((tokens_BL, targets_BL),) = batches(0, 1)
    return DatasetStream(list(zip(tokens_BL, targets_BL, strict=True)), batch_size=len(tokens_BL), seed=1)


class FullDisk(Disk):
    """A disk on which nothing can be written from a certain save on."""

    def __init__(self, saves: int) -> None:
        self.left = saves

    def write(self, fd: int, data: memoryview) -> int:
        if self.left <= 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return os.write(fd, data)

    def replace(self, source: Any, target: Any) -> None:
        super().replace(source, target)
        self.left -= str(target).endswith("run_state.json")  # what a save writes last


def run_on_a_full_disk(folder: Path, on_save_error: str) -> list[Any]:
    models, disk = [model("softmax") for _ in range(WORLD)], FullDisk(saves=1)

    def fit(comm: Comm) -> str:
        trainer = Trainer(models[comm.rank], TrainConfig(**{**SETTINGS, "steps": 3}), comm)
        place = RunDir(folder, disk=disk) if comm.rank == 0 else folder
        run = Run(trainer, stream(), folder=place, save_every=1, on_save_error=on_save_error, stop=StopRequest())  # type: ignore[arg-type]
        return run.fit()

    return outcomes(WORLD, fit)


def test_where_rank_0_cannot_save_all_stop_and_say_why(tmp_path: Path) -> None:
    error, *others = run_on_a_full_disk(tmp_path, "stop")
    assert isinstance(error, SaveError)
    assert [str(other) for other in others] == [f"rank 0: {error}"] * 2
    assert "No space left on device" in str(error)
    assert checkpoint.load(tmp_path / "latest.safetensors").info["step"] == 1


def test_where_rank_0_cannot_save_all_go_on_if_told_to(tmp_path: Path) -> None:
    assert run_on_a_full_disk(tmp_path, "continue") == ["done"] * WORLD
    assert checkpoint.load(tmp_path / "latest.safetensors").info["step"] == 1


@pytest.mark.parametrize(
    "error", [MemoryError("no memory"), RuntimeError("DefaultCPUAllocator: can't allocate memory")]
)
def test_a_rank_without_memory_is_named_by_the_others(error: Exception) -> None:
    models = [model("softmax") for _ in range(WORLD)]

    def fail(*_: object) -> None:
        raise error

    def step(comm: Comm) -> None:
        if comm.rank == 1:
            models[1].layers[0].register_forward_hook(fail)
        Trainer(models[comm.rank], TrainConfig(**SETTINGS), comm).train_step(*batches(0))

    found = outcomes(WORLD, step)
    assert found[1] is error
    assert [str(found[rank]) for rank in (0, 2)] == [f"rank 1: {type(error).__name__}: {error}"] * 2


def poison(gradient: Tensor) -> Tensor:
    return torch.full_like(gradient, float("nan"))


@pytest.mark.parametrize("fatal", [False, True])
def test_nan_on_one_rank_is_nan_for_all(fatal: bool) -> None:
    models = [model("softmax") for _ in range(WORLD)]
    before = models[0].layers[0].mixer.get_parameter("out_proj.weight").detach().clone()

    def step(comm: Comm) -> bool:
        if comm.rank == 1:
            models[1].layers[0].mixer.get_parameter("out_proj.weight").register_hook(poison)
        trainer = Trainer(models[comm.rank], TrainConfig(**SETTINGS, fail_on_non_finite=fatal), comm)
        return trainer.train_step(*batches(0)).skipped_update

    found = outcomes(WORLD, step)
    if not fatal:
        assert found == [True] * WORLD
        assert all(torch.equal(m.layers[0].mixer.get_parameter("out_proj.weight"), before) for m in models)
        return
    assert {type(each) for each in found} == {NonFiniteError}
    assert len({str(each) for each in found}) == 1 and "out_proj.weight" in str(found[0])


def test_nan_in_a_worker_that_trains_alone_is_told_by_all() -> None:
    models = [model("softmax") for _ in range(2)]

    def step(comm: Comm) -> bool:
        trainer = OuterTrainer(models[comm.rank], TrainConfig(**SETTINGS, sync_every=4, workers_outer=2), comm)
        if comm.rank == 1:
            trainer.workers[1].model.layers[0].mixer.get_parameter("out_proj.weight").register_hook(poison)
        return trainer.train_step(*batches(0)).skipped_update

    assert ranks(2, step) == [True, True]


def test_data_that_a_rank_does_not_have_is_everyone_s_error(tmp_path: Path) -> None:
    tokens = runs.token_file(tmp_path)

    def build(comm: Comm) -> None:
        where = tmp_path / "gone.txt" if comm.rank == 1 else tokens
        build_parts(RunConfig(token_file=where, batch_size=4, seq_len=8, out_dir=tmp_path, preset="plain"), None, comm)

    found = outcomes(2, build)
    assert isinstance(found[1], UserError) and not isinstance(found[1], RankFailed)
    assert isinstance(found[0], RankFailed)
    assert "rank 1: " in str(found[0]) and "gone.txt" in str(found[0])


def test_a_wall_time_is_what_rank_0_measures(tmp_path: Path) -> None:
    config = RunConfig(token_file=runs.token_file(tmp_path), out_dir=tmp_path, preset="plain", time_budget="60s")
    small = config.replace(d_model=8, d_state=4, base_layers=1, batch_size=4, seq_len=8, eval_batches=2, threads=1)
    parts = ranks(2, lambda comm: build_parts(small, None, comm))
    assert parts[0].config.steps == parts[1].config.steps == parts[0].trainer.target_step > 1
    assert [parts[0].notes] == [each.notes for each in parts[1:]]
