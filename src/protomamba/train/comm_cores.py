"""Which cores each rank of a machine keeps to.

Left to the scheduler, the threads that move messages wake on whatever core is free for a moment, often the one where
another rank computes, and that rank then keeps all others waiting. Kept to a share of the cores, a rank disturbs
itself only (docs/decisions/101).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

from protomamba.machine import allowed_cpus, by_core, machine_name


@dataclass(frozen=True)
class Place:
    """Where a rank runs: its machine, the processors it may use, by core, and how many threads it has."""

    machine: str
    cores: list[list[int]]
    threads: int


def this_place(threads: int) -> Place:
    """Where this process runs."""
    return Place(machine_name(), by_core(allowed_cpus()), threads)


def own_share(places: Sequence[Place], rank: int) -> set[int] | None:
    """The processors of this rank's share of its machine's cores, in which no other rank has a part.

    None where the rank is to stay as it is: alone on its machine, among ranks that somebody has given different
    processors, or where a share would have fewer processors than its rank has threads.
    """
    own = places[rank]
    neighbours = [other for other, place in enumerate(places) if place.machine == own.machine]
    count = len(neighbours)
    starts = [i * len(own.cores) // count for i in range(count + 1)]
    shares = [list(chain(*own.cores[start:stop])) for start, stop in pairwise(starts)]
    if count == 1 or any(places[other].cores != own.cores for other in neighbours):
        return None
    if any(len(share) < places[other].threads for share, other in zip(shares, neighbours, strict=True)):
        return None
    return set(shares[neighbours.index(rank)])


def may_bind() -> bool:
    """Whether this system can bind threads to cores, and OpenMP's own variable does not forbid it."""
    return hasattr(os, "sched_setaffinity") and os.environ.get("OMP_PROC_BIND", "").lower() != "false"


def keep_to(cpus: set[int]) -> None:
    """Let all threads of this process, and those they start, run on these processors only."""
    for thread in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # one that has just ended
            os.sched_setaffinity(int(thread.name), cpus)
