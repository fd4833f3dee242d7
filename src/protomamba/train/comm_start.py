"""How a run begins on several ranks: where it resumes, what the ranks must agree in, and what it says of them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch

from protomamba import __version__, kernels
from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import Resumable, find_resumable
from protomamba.data.source import Source
from protomamba.errors import ConfigError, UserError
from protomamba.run_config import RunConfig
from protomamba.train.comm import Comm, restarted
from protomamba.train.comm_workers import gradient_shards, outer_workers
from protomamba.train.resume import Resumed, find_resume, resume_from, run_folder
from protomamba.train.trainer import Trainer

# Where a rank finds things, and what it shows, may differ.
OF_THE_MACHINE = {"out_dir", "progress", "prefetch_workers", "prefetch_buffer", "allow_mixed_ranks"}


def refuse_unshareable(config: RunConfig, comm: Comm) -> None:
    """ConfigError for what cannot be shared out to these ranks."""
    shards = gradient_shards(config, comm.world)
    comm.shards(shards)
    outer_workers(config, shards)
    if shards > config.batch_size:
        raise ConfigError(
            f"{shards} gradient shards of a batch of {config.batch_size} rows: each needs a row; raise --batch-size "
            "(the rows of all ranks together), or use fewer ranks or --grad-shards"
        )


def find_together(config: RunConfig, comm: Comm) -> Resumed | None:
    """The checkpoint that rank 0 finds, on every rank. UserError on a rank that cannot read it.

    After a restart it is the newest that this launch has written, whatever --resume says; else what that says. Another
    run's checkpoints in the folder stay as they are: the restart of a run that was refused is refused again.
    """
    again = _again(config)
    newest = find_resumable(again.out_dir) if restarted() and comm.rank == 0 else None
    is_own = newest is not None and newest.checkpoint.config.get("launch") == comm.launch
    resumed = None
    if comm.rank == 0:
        resumed = resume_from(again, newest) if newest and is_own else find_resume(config)
    path, is_own = comm.all_gather_object([str(resumed.found.path) if resumed else None, is_own])[0]
    if comm.rank == 0 or path is None:
        return resumed
    return resume_from(again if is_own else config, Resumable(Path(path), checkpoint.load(path)))


def _again(config: RunConfig) -> RunConfig:
    """The same command line again, resuming its own run."""
    return config.replace(resume="auto", out_dir=run_folder(config))


def check_ranks(comm: Comm, config: RunConfig, training: Source, resumed: Resumed | None) -> list[str]:
    """UserError where ranks differ in what decides the numbers; with --allow-mixed-ranks 1 notes of it instead."""
    differences = comm.differences(facts(config, training, resumed))
    if differences and not config.allow_mixed_ranks:
        raise UserError(
            "the ranks differ in something that changes the numbers (--allow-mixed-ranks 1 trains anyway):\n  "
            + "\n  ".join(differences)
        )
    return [f"--allow-mixed-ranks 1: {difference}" for difference in differences]


def facts(config: RunConfig, training: Source, resumed: Resumed | None) -> dict[str, str]:
    """What must be the same on all ranks, so that it does not matter which of them computes which part of a step."""
    path = kernels.describe()
    settings = {name: value for name, value in config.to_json().items() if name not in OF_THE_MACHINE}
    found: dict[str, Any] = {
        "protomamba": __version__,
        "torch": torch.__version__,
        "kernels": path["kernels"],
        "CPU level": path["cpu_level"],
        "matrix products": path["matmul"],
        "threads": torch.get_num_threads(),
        "configuration": digest(settings),
        "data": digest([list(each.values()) for each in training.identity()]),
        "checkpoint": resumed.found.checkpoint.info.get("step") if resumed else None,
    }
    return {name: str(value) for name, value in found.items()}


def digest(value: Any) -> str:
    """A short checksum of plain values."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def ranks_line(trainer: Trainer, rows: int) -> dict[str, str]:
    """The header's line of who computes what; none where it is one process with one shard."""
    world, shards = trainer.comm.world, trainer.grad_shards
    if (world, shards) == (1, 1):
        return {}
    every, workers = trainer.config.sync_every, outer_workers(trainer.config, shards)
    meeting = f" of {workers} workers, which synchronise every {every:,} steps" if workers else ""
    cores = ", each on its own cores" if trainer.comm.cores else ""
    return {"ranks": f"{world} for {shards} gradient shards{meeting}{cores}; {rows} rows per batch in total"}
