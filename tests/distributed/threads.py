"""Ranks as threads of one process: what they compute is tested without a socket."""

from __future__ import annotations

import queue
import threading
from collections import defaultdict
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

from torch import Tensor

from protomamba.train.comm import Comm
from protomamba.train.comm_mesh import exchange

T = TypeVar("T")
WAIT_S = 60.0


class Arrival:
    """A message under way: the copy at its arrival, or nothing to wait for at its sender."""

    def __init__(self, into: Tensor | None = None, source: queue.SimpleQueue[Tensor] | None = None) -> None:
        self.into, self.source = into, source

    def wait(self, timeout: timedelta = timedelta(seconds=WAIT_S)) -> None:
        if self.into is not None and self.source is not None:
            tensor = self.source.get(timeout=min(WAIT_S, timeout.total_seconds()))
            assert tensor.numel() == self.into.numel() and tensor.dtype == self.into.dtype
            self.into.view(-1).copy_(tensor.view(-1))


class ThreadMesh:
    """One of `world` threads' ends; `mail` is theirs together."""

    def __init__(self, rank: int, world: int, mail: dict[Any, queue.SimpleQueue[Tensor]]) -> None:
        self.rank, self.world, self.mail, self.sent_bytes = rank, world, mail, 0

    def send(self, tensor: Tensor, peer: int, tag: int) -> Arrival:
        assert tensor.is_contiguous() and peer != self.rank
        self.sent_bytes += tensor.numel() * tensor.element_size()
        self.mail[self.rank, peer, tag].put(tensor.clone())
        return Arrival()

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Arrival:
        assert tensor.is_contiguous() and peer != self.rank
        return Arrival(tensor, self.mail[peer, self.rank, tag])

    def run(self, blocking: Callable[[], T]) -> T:
        return blocking()

    def swap(self, tensor: Tensor) -> list[Tensor]:
        return exchange(self, tensor)

    def close(self, error: BaseException | None = None) -> None:
        pass


def ranks(world: int, work: Callable[[Comm], T]) -> list[T]:
    """What `work` returns on each of `world` ranks; the first exception of any."""
    mail: dict[Any, queue.SimpleQueue[Tensor]] = defaultdict(queue.SimpleQueue)
    found: dict[int, T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            found[rank] = work(Comm(ThreadMesh(rank, world, mail)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise next((e for e in errors if not isinstance(e, queue.Empty)), errors[0])
    return [found[rank] for rank in range(world)]
