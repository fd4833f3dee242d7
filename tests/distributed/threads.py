"""Ranks as threads of one process: what they compute, and how they see one another fail, is tested without a socket."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor

from protomamba.model.sequence_model import SequenceModel
from protomamba.train.comm import Comm, Local
from protomamba.train.comm_messages import Gather
from protomamba.train.comm_watch import RankFailed, Watch
from tests.runs import assert_equal

T = TypeVar("T")
WAIT_S, POLL_S = 60.0, 0.2
Box = queue.SimpleQueue[Tensor]


class Mail:
    """Messages under way, by sender, receiver and tag."""

    def __init__(self) -> None:
        self._boxes: dict[tuple[int, int, int], Box] = {}

    def box(self, sender: int, receiver: int, tag: int) -> Box:
        """The same one for both, whoever asks first."""
        # Not a defaultdict: its factory may start the garbage collector, which may let the other thread in.
        return self._boxes.setdefault((sender, receiver, tag), queue.SimpleQueue())


class Arrival:
    """A message under way: the copy at its arrival, or nothing to wait for at its sender."""

    def __init__(self, watch: Watch, into: Tensor | None = None, source: Box | None = None) -> None:
        self.watch, self.into, self.source = watch, into, source

    def wait(self, timeout: timedelta = timedelta(seconds=WAIT_S)) -> None:
        if self.into is not None and self.source is not None:
            tensor = self._taken(self.source, time.monotonic() + min(WAIT_S, timeout.total_seconds()))
            assert tensor.numel() == self.into.numel() and tensor.dtype == self.into.dtype
            self.into.view(-1).copy_(tensor.view(-1))

    def _taken(self, source: Box, deadline: float) -> Tensor:
        """The message; RankFailed where another rank has given up."""
        while time.monotonic() < deadline:
            try:
                return source.get(timeout=POLL_S)
            except queue.Empty:
                self.watch.check()
        raise queue.Empty


class ThreadMesh:
    """One of `world` threads' ends; `mail` and `store` are theirs together."""

    def __init__(self, rank: int, world: int, mail: Mail, store: Any) -> None:
        self.rank, self.world, self.mail, self.sent_bytes = rank, world, mail, 0
        self.watch, self.launch, self._gather = Watch(store, rank, world), "threads", Gather(self)

    def __deepcopy__(self, memo: dict[int, Any]) -> ThreadMesh:
        return self

    def send(self, tensor: Tensor, peer: int, tag: int) -> Arrival:
        assert tensor.is_contiguous() and peer != self.rank
        self.sent_bytes += tensor.numel() * tensor.element_size()
        self.mail.box(self.rank, peer, tag).put(tensor.clone())
        return Arrival(self.watch)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Arrival:
        assert tensor.is_contiguous() and peer != self.rank
        return Arrival(self.watch, tensor, self.mail.box(peer, self.rank, tag))

    def run(self, blocking: Callable[[], T]) -> T:
        return blocking()

    def all_gather(self, tensor: Tensor, ranks: Sequence[int] | None = None) -> list[Tensor]:
        return self._gather.all_gather(tensor, ranks or range(self.world))

    def close(self, error: BaseException | None = None) -> None:
        if error is not None:
            self.watch.last_words(error)


def outcomes(world: int, work: Callable[[Comm], T]) -> list[T | BaseException]:
    """What `work` returns on each of `world` ranks, or what it raises there."""
    mail, store = Mail(), torch.distributed.HashStore()
    found: dict[int, T | BaseException] = {}

    def run(rank: int) -> None:
        try:
            with Comm(ThreadMesh(rank, world, mail, store)) as comm:
                found[rank] = work(comm)
        except BaseException as error:
            found[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[rank] for rank in range(world)]


def ranks(world: int, work: Callable[[Comm], T]) -> list[T]:
    """What `work` returns on each of `world` ranks; the first exception of any that is not about another rank."""
    found = outcomes(world, work)
    errors = [each for each in found if isinstance(each, BaseException)]
    if errors:
        raise next((each for each in errors if not isinstance(each, RankFailed)), errors[0])
    return [each for each in found if not isinstance(each, BaseException)]


def agreed(models: Sequence[SequenceModel], work: Callable[[Comm, SequenceModel], tuple[Any, Any]]) -> tuple[Any, Any]:
    """What `work` returns on rank 0 of as many ranks as models, or in one process: the trainer's parts and what the
    steps told. All ranks are told the same and have the same weights.

    The models are made before: all threads have one generator.
    """
    if len(models) == 1:
        return work(Local(), models[0])
    found = ranks(len(models), lambda comm: work(comm, models[comm.rank]))
    for parts, told in found[1:]:
        assert_equal(parts["model"], found[0][0]["model"], "weights")
        assert told == found[0][1]
    return found[0]
