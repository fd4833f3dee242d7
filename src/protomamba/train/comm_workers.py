"""Which shards a worker of --sync-every has, and which ranks compute them.

The G gradient shards in order are cut into K workers of G / K shards; K divides G. A worker that lies on several ranks
adds its shards' gradients over them at each step, as a run without workers does over all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from protomamba.config import TrainFields
from protomamba.errors import ConfigError
from protomamba.train.comm_mesh import Mesh
from protomamba.train.comm_messages import Work
from protomamba.train.comm_tree import share

T = TypeVar("T")


def gradient_shards(config: TrainFields, world: int) -> int:
    """How many there are: as given, else one a rank at the start, or the next number that the workers divide."""
    workers = config.workers_outer or 1
    return config.grad_shards or -(-world // workers) * workers


def outer_workers(config: TrainFields, shards: int) -> int | None:
    """The number of workers; None where all share every step. ConfigError where the shards cannot be cut so."""
    workers = config.workers_outer
    if config.sync_every is None:
        if workers is not None:
            raise ConfigError(
                f"--workers-outer {workers}: workers synchronise every --sync-every steps; give that flag as well"
            )
        return None
    if workers is not None and shards % workers:
        raise ConfigError(
            f"--workers-outer {workers}: does not divide --grad-shards {shards}; every worker needs the "
            f"same number of shards: give a divisor of {shards}, or leave --grad-shards out"
        )
    return workers or shards


def members(worker: int, workers: int, shards: int, world: int) -> dict[int, range]:
    """The ranks that compute a worker's shards, and which each: counted from the worker's first."""
    span, found = share(shards, workers, worker), {}
    for rank in range(world):
        mine = share(shards, world, rank)
        start, stop = max(mine.start, span.start), min(mine.stop, span.stop)
        if start < stop:
            found[rank] = range(start - span.start, stop - span.start)
    return found


def led(workers: int, shards: int, world: int) -> list[range]:
    """By rank, the workers whose first shard it has: it speaks for them."""
    first = [min(members(worker, workers, shards, world)) for worker in range(workers)]
    return [
        range(first.index(rank), first.index(rank) + first.count(rank)) if rank in first else range(0)
        for rank in range(world)
    ]


class Group:
    """Some ranks of a mesh, in their order, as a mesh of their own. Any two ranks may be together in one group only."""

    def __init__(self, mesh: Mesh, ranks: Sequence[int]) -> None:
        self.mesh, self.ranks = mesh, list(ranks)
        self.rank, self.world = self.ranks.index(mesh.rank), len(self.ranks)

    @property
    def sent_bytes(self) -> int:
        return self.mesh.sent_bytes

    @property
    def launch(self) -> str | None:
        return self.mesh.launch

    def send(self, tensor: Tensor, peer: int, tag: int) -> Work:
        return self.mesh.send(tensor, self.ranks[peer], tag)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Work:
        return self.mesh.receive(tensor, self.ranks[peer], tag)

    def run(self, blocking: Callable[[], T]) -> T:
        return self.mesh.run(blocking)

    def all_gather(self, tensor: Tensor, ranks: Sequence[int] | None = None) -> list[Tensor]:
        return self.mesh.all_gather(tensor, [self.ranks[rank] for rank in ranks or range(self.world)])

    def close(self, error: BaseException | None = None) -> None:
        """The whole mesh closes, not a part of it."""
