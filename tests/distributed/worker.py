"""What the ranks of the tests do: `python -m tests.distributed.worker TASK FOLDER`, as one rank of several."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import torch

from protomamba.errors import UserError
from protomamba.machine import allowed_cpus
from protomamba.train.comm import Comm, Ranks
from protomamba.train.comm_mesh import Gloo
from tests.distributed.test_sums import SHAPES, parameters, summed

SILENCE_S, START_S = 7.0, 5.0


def sums_and_weights(comm: Comm, folder: Path) -> None:
    torch.save((summed(comm), weights(comm)), folder / f"rank-{comm.rank}.pt")


def weights(comm: Comm) -> dict[str, torch.Tensor]:
    """What each rank has after each has set its own to its number, from 1."""
    named = parameters()
    comm.partition(named)
    for piece in comm.pieces():
        piece.of(named[piece.name].detach()).fill_(1 + comm.rank)
    comm.all_gather_weights()
    return {name: named[name].detach() for name in SHAPES}


def cores(comm: Comm, folder: Path) -> None:
    """The processors of each of its threads, one of which is older and one younger, before and after it has a share."""
    done = threading.Event()
    threading.Thread(target=done.wait, daemon=True).start()
    before = allowed_cpus()
    comm.share_cores(1)
    threading.Thread(target=done.wait, daemon=True).start()
    after = [os.sched_getaffinity(int(thread.name)) for thread in Path("/proc/self/task").iterdir()]
    torch.save((before, after), folder / f"rank-{comm.rank}.pt")


def raises(comm: Comm, folder: Path) -> None:
    if comm.rank == 1:
        raise UserError("no-such-file.bin: cannot be read")
    comm.all_gather(torch.zeros(1))


def without_memory(comm: Comm, folder: Path) -> None:
    if comm.rank == 1:
        comm.mesh.run(lambda: torch.empty(1 << 50))
    comm.all_gather(torch.zeros(1))


def killed(comm: Comm, folder: Path) -> None:
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    comm.all_gather(torch.zeros(1))


def stopped(comm: Comm, folder: Path) -> None:
    if comm.rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    comm.all_gather(torch.zeros(1))


TASKS: dict[str, Callable[[Comm, Path], None]] = {
    f.__name__: f for f in (sums_and_weights, cores, raises, without_memory, killed, stopped)
}


def main() -> int:
    torch.set_num_threads(1)
    try:
        with Comm(Gloo(START_S, SILENCE_S)) if "--impatient" in sys.argv else Ranks() as comm:
            TASKS[sys.argv[1]](comm, Path(sys.argv[2]))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
