"""Steps on several ranks beside those of one process, all in rotation: `protomamba bench --sections ranks`.

The parent starts this module under torch's launcher. Where one process alone is timed, the other ranks wait.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from protomamba.bench.memory import high_water_mib
from protomamba.bench.shapes import NAMED, NEVER, Shape
from protomamba.bench.timing import Ratio, spread
from protomamba.config import TrainConfig
from protomamba.errors import UserError
from protomamba.kernels import keep_freed_memory
from protomamba.machine import allowed_cpus
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.comm import Comm, Local, Ranks
from protomamba.train.comm_cores import keep_to
from protomamba.train.trainer import Trainer

Times = tuple[float, float]  # seconds by the wall and of the processor
WORLD, LIMIT_S = 2, 3_600
# Steps of a turn, as training takes them: one after the other.
TURN = 3
MEMORY_WORLDS, MEMORY_STEPS = (1, 2, 4), 3
ALONE, THREADS, SAME, MORE = "one process", f"{WORLD} threads", f"{WORLD} ranks", f"{WORLD} ranks, as many rows each"
# What ranks could reach if they had nothing to say to one another: the rest is shared caches and memory.
APART = f"{WORLD} unconnected processes"


def ranks_table(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row a shape. UserError where the launcher fails."""
    rows = launched(WORLD, ["times", names, rounds])
    return [{k: Ratio(*v) if isinstance(v, list) else v for k, v in row.items()} for row in rows]


def memory_table(name: str) -> list[dict[str, Any]]:
    """What a rank of 1, 2 and 4 holds and sends, with as many rows each: one row a number. UserError as above."""
    return [row for world in MEMORY_WORLDS for row in launched(world, ["memory", name])]


def launched(world: int, request: list[Any]) -> list[dict[str, Any]]:
    """The rows that rank 0 of so many prints."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(world)]
    command += ["-m", "protomamba.bench.ranks", json.dumps(request)]
    # The launcher sets it where there are several, and says so on standard error.
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=LIMIT_S, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    if done.returncode:
        raise UserError(
            f"bench: {world} ranks failed: {(done.stderr.strip().splitlines() or ['no error message'])[-1]}"
        )
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    return rows


def memory(comm: Comm, shape: Shape) -> dict[str, Any]:
    """The most of any rank, in a process that has done nothing but a few steps; the same call on every rank."""
    trainer = trainer_of(shape, comm)
    batch = replace(shape, batch=shape.batch * comm.world).batches()
    for _ in range(MEMORY_STEPS):
        before = comm.mesh.sent_bytes
        trainer.train_step(*batch)
    figures = comm.all_gather_object(
        [high_water_mib(), moments_bytes(trainer) / 2**20, (comm.mesh.sent_bytes - before) / 2**20]
    )
    peak, moments, sent = (max(column) for column in zip(*figures, strict=True))
    ranks = f"{comm.world} rank{'s' if comm.world > 1 else ''}"
    return {
        "shape": f"{shape.text}; {ranks}, as many rows each",
        "peak_rss_mib a rank": peak,
        "moments_mib a rank": moments,
        "sent_mib a step and rank": sent,
    }


def measure(comm: Comm, shape: Shape, rounds: int) -> dict[str, Any]:
    """The row of one shape; the same call on every rank."""
    single, shared = trainer_of(shape, Local()), trainer_of(shape, comm)
    wide = replace(shape, batch=shape.batch * comm.world)
    runs = {
        ALONE: timed(comm, single, shape, threads=1, alone=True),
        APART: timed(comm, single, shape),
        THREADS: timed(comm, single, shape, threads=comm.world, alone=True),
        SAME: timed(comm, shared, shape),
        MORE: timed(comm, shared, wide),
    }
    for run in runs.values():
        run()
    before = comm.mesh.sent_bytes
    runs[SAME]()
    sent = (comm.mesh.sent_bytes - before) // TURN
    times = {name: list[Times]() for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(run())
    return described(comm, shape, times, sent, shared)


def described(comm: Comm, shape: Shape, times: dict[str, list[Times]], sent: int, shared: Trainer) -> dict[str, Any]:
    """Ratios of tokens a second within a round, and what a rank sends and keeps."""

    def gain(name: str, to: str, work: int = 1, clock: int = 0) -> list[float]:
        found = spread([work * b[clock] / a[clock] for a, b in zip(times[name], times[to], strict=True)])
        return [found.median, found.low, found.high]

    return {
        "shape": shape.text,
        f"{APART} (x tokens/s)": gain(APART, ALONE, comm.world),
        "weak scaling (x tokens/s)": gain(MORE, ALONE, comm.world),
        f"{APART} by processor time": gain(APART, ALONE, comm.world, clock=1),
        "weak scaling by processor time": gain(MORE, ALONE, comm.world, clock=1),
        "same batch (x tokens/s)": gain(SAME, ALONE),
        "same batch by processor time": gain(SAME, ALONE, clock=1),
        "ranks / threads (x tokens/s)": gain(SAME, THREADS),
        "step_ms of one process": 1e3 * statistics.median(wall for wall, _ in times[ALONE]),
        "sent_mib a step and rank": sent / 2**20,
        "gradient_mib": sum(p.numel() * p.element_size() for p in shared.model.parameters()) / 2**20,
        "moments_mib a rank": moments_bytes(shared) / 2**20,
    }


def moments_bytes(trainer: Trainer) -> int:
    """What this rank keeps of the optimizer's state."""
    return sum(x.numel() * x.element_size() for slots in trainer.optimizer.state().values() for x in slots.values())


def trainer_of(shape: Shape, comm: Comm) -> Trainer:
    settings = TrainConfig(steps=NEVER, grad_clip_norm=1e-3, ff_lr=0.0, lr_warmup_steps=0)
    return Trainer(SequenceModel(shape.config(), seed=0), settings, comm)


def timed(comm: Comm, trainer: Trainer, shape: Shape, threads: int = 1, alone: bool = False) -> Callable[[], Times]:
    """A function that takes a turn, on rank 0 or on all: a step's seconds and processor time of this process.

    The latter is what counts on a busy machine, with one thread a rank and a core for each.
    """
    batch = shape.batches()

    def run() -> Times:
        everywhere = allowed_cpus()
        if not alone:
            comm.share_cores(threads)
        comm.all_gather_object(None)
        started, used = time.perf_counter(), time.process_time()
        if not alone or comm.rank == 0:
            torch.set_num_threads(threads)
            for _ in range(TURN):
                trainer.train_step(*batch)
        took = (time.perf_counter() - started) / TURN, (time.process_time() - used) / TURN
        comm.all_gather_object(None)
        if comm.cores:
            keep_to(everywhere)
        return took

    return run


def main() -> None:
    """One rank of the measurement."""
    what, *request = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    keep_freed_memory()
    with Ranks() as comm:
        if what == "memory":
            rows = [memory(comm, NAMED[request[0]])]
        else:
            rows = [measure(comm, NAMED[name], request[1]) for name in request[0]]
        if comm.rank == 0:
            print(json.dumps(rows))


if __name__ == "__main__":
    main()
