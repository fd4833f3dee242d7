"""Steps on several ranks beside those of one process, all in rotation: `protomamba bench --sections ranks`.

The parent starts this module under torch's launcher. Where one process alone is timed, the other ranks wait.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from protomamba.bench.shapes import NAMED, NEVER, Shape
from protomamba.bench.timing import Ratio, spread
from protomamba.config import TrainConfig
from protomamba.errors import UserError
from protomamba.kernels import keep_freed_memory
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.comm import Comm, Local, Ranks
from protomamba.train.trainer import Trainer

Times = tuple[float, float]  # seconds by the wall and of the processor
WORLD, LIMIT_S = 2, 3_600
ALONE, THREADS, SAME, MORE = "one process", f"{WORLD} threads", f"{WORLD} ranks", f"{WORLD} ranks, as many rows each"


def ranks_table(names: list[str], rounds: int) -> list[dict[str, Any]]:
    """One row a shape. UserError where the launcher fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(WORLD)]
    command += ["-m", "protomamba.bench.ranks", json.dumps([names, rounds])]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_S)
    if done.returncode:
        raise UserError(f"bench: {WORLD} ranks failed: {(done.stderr.strip().splitlines() or ['without a word'])[-1]}")
    return [{k: Ratio(*v) if isinstance(v, list) else v for k, v in row.items()} for row in json.loads(done.stdout)]


def measure(comm: Comm, shape: Shape, rounds: int) -> dict[str, Any]:
    """The row of one shape; the same call on every rank."""
    single, shared = trainer_of(shape, Local()), trainer_of(shape, comm)
    wide = replace(shape, batch=shape.batch * comm.world)
    runs = {
        ALONE: timed(comm, single, shape, threads=1, alone=True),
        THREADS: timed(comm, single, shape, threads=comm.world, alone=True),
        SAME: timed(comm, shared, shape),
        MORE: timed(comm, shared, wide),
    }
    for run in runs.values():
        run()
    before = comm.mesh.sent_bytes
    runs[SAME]()
    sent = comm.mesh.sent_bytes - before
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

    kept = sum(x.numel() * x.element_size() for slots in shared.optimizer.state().values() for x in slots.values())
    return {
        "shape": shape.text,
        "weak scaling (x tokens/s)": gain(MORE, ALONE, comm.world),
        "weak scaling by processor time": gain(MORE, ALONE, comm.world, clock=1),
        "same batch (x tokens/s)": gain(SAME, ALONE),
        "same batch by processor time": gain(SAME, ALONE, clock=1),
        "ranks / threads (x tokens/s)": gain(SAME, THREADS),
        "step_ms of one process": 1e3 * statistics.median(wall for wall, _ in times[ALONE]),
        "sent_mib a step and rank": sent / 2**20,
        "gradient_mib": sum(p.numel() * p.element_size() for p in shared.model.parameters()) / 2**20,
        "moments_mib a rank": kept / 2**20,
    }


def trainer_of(shape: Shape, comm: Comm) -> Trainer:
    settings = TrainConfig(steps=NEVER, grad_clip_norm=1e-3, ff_lr=0.0, lr_warmup_steps=0)
    return Trainer(SequenceModel(shape.config(), seed=0), settings, comm)


def timed(comm: Comm, trainer: Trainer, shape: Shape, threads: int = 1, alone: bool = False) -> Callable[[], Times]:
    """A function that takes one step, on rank 0 or on all, and returns the seconds and this process's processor time.

    The latter is what counts on a busy machine, with one thread a rank and a core for each.
    """
    batch = shape.batches()

    def run() -> Times:
        comm.tell(None)
        started, used = time.perf_counter(), time.process_time()
        if not alone or comm.rank == 0:
            torch.set_num_threads(threads)
            trainer.train_step(*batch)
        return time.perf_counter() - started, time.process_time() - used

    return run


def main() -> None:
    """One rank of the measurement."""
    names, rounds = json.loads(sys.argv[1])
    keep_freed_memory()
    with Ranks() as comm:
        rows = [measure(comm, NAMED[name], rounds) for name in names]
        if comm.rank == 0:
            print(json.dumps(rows))


if __name__ == "__main__":
    main()
