"""How tensors get from rank to rank: not at all (`Alone`), or point to point over gloo (`Gloo`)."""

from __future__ import annotations

import atexit
import os
import queue
import secrets
import sys
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from protomamba.errors import UserError
from protomamba.train.comm_messages import Gather, Work
from protomamba.train.comm_watch import SILENCE_S, START_S, RankFailed, Watch

T = TypeVar("T")
POLL_S = 1.0
# Torch's words where there is no memory, which raise the same RuntimeError as a broken link.
OUT_OF_MEMORY = "DefaultCPUAllocator"
# Tags of messages from here on are the caller's; those below are for `all_gather`.
FREE = 16


class Mesh(Protocol):
    """Ranks that can send to one another. Messages with one tag between two ranks arrive in order."""

    rank: int
    world: int

    @property
    def sent_bytes(self) -> int: ...
    @property
    def launch(self) -> str | None: ...
    def send(self, tensor: Tensor, peer: int, tag: int) -> Work: ...
    def receive(self, tensor: Tensor, peer: int, tag: int) -> Work: ...
    def run(self, blocking: Callable[[], T]) -> T: ...
    def all_gather(self, tensor: Tensor, ranks: Sequence[int] | None = None) -> list[Tensor]: ...
    def close(self, error: BaseException | None = None) -> None: ...


class Alone:
    """One process: nothing is sent."""

    rank, world, sent_bytes, launch = 0, 1, 0, None

    def send(self, tensor: Tensor, peer: int, tag: int) -> Work:
        raise RuntimeError("a single process has no other rank to send to")

    receive = send

    def run(self, blocking: Callable[[], T]) -> T:
        return blocking()

    def all_gather(self, tensor: Tensor, ranks: Sequence[int] | None = None) -> list[Tensor]:
        return [tensor]

    def close(self, error: BaseException | None = None) -> None:
        pass


class Gloo:
    """The ranks of torch's launcher. Everything that waits does so in a thread of its own, so that a failure is seen.

    launch: a name that the launcher's ranks have in common, before and after its restarts, with no other launch.
    RankFailed, with the other rank's reason, from whatever waits for one that has failed.
    """

    def __init__(self, start_s: float = START_S, silence_s: float = SILENCE_S) -> None:
        import torch.distributed as dist
        from torch.distributed.distributed_c10d import PrefixStore
        from torch.distributed.rendezvous import rendezvous

        self._dist = dist
        limit = timedelta(seconds=start_s)
        try:
            store, self.rank, self.world = next(rendezvous("env://", timeout=limit))
        except dist.DistError as error:
            raise RankFailed(f"the ranks did not connect: {error}; start them with torchrun") from error
        self.launch = store.compare_set("protomamba/launch", "", secrets.token_hex(8)).decode()
        # The launcher's store outlives a restart, and holds the addresses of the processes before it.
        store = PrefixStore(f"protomamba/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        self.sent_bytes, self._gather = 0, Gather(self)
        self.watch = Watch(store, self.rank, self.world, silence_s)
        self.watch.roll_call(start_s)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.world, timeout=limit)
        dist.monitored_barrier(timeout=limit, wait_all_ranks=True)
        # One connection for each direction: a thread that sends holds gloo's lock on it, and what comes in would spin.
        self._up, self._down = dist.group.WORLD, dist.new_group(backend="gloo", timeout=limit)
        self.watch.start()
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        threading.Thread(target=self._serve, name="communication", daemon=True).start()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gloo:
        """A copy of a trainer talks to the same ranks."""
        return self

    def send(self, tensor: Tensor, peer: int, tag: int) -> Work:
        """Begin to send a contiguous tensor, which must stay as it is until the work has been waited for."""
        self.sent_bytes += tensor.numel() * tensor.element_size()
        return self._begin(self._dist.isend, tensor, peer, tag, self._up if peer > self.rank else self._down)

    def receive(self, tensor: Tensor, peer: int, tag: int) -> Work:
        """Begin to receive into a contiguous tensor of the sender's size."""
        return self._begin(self._dist.irecv, tensor, peer, tag, self._down if peer > self.rank else self._up)

    def _begin(self, call: Callable[..., Any], tensor: Tensor, peer: int, tag: int, group: Any) -> Work:
        try:
            work: Work = call(tensor, peer, tag=tag, group=group)
        except RuntimeError as error:
            raise self.watch.explain(error) from error
        return work

    def run(self, blocking: Callable[[], T]) -> T:
        """The result of a function that waits for messages; RankFailed as soon as another rank is known to be gone."""
        done, outcome = threading.Event(), list[Any]()

        def job() -> None:
            try:
                outcome.extend((blocking(), None))
            except Exception as error:
                outcome.extend((None, error))
            done.set()

        self._jobs.put(job)
        while not done.wait(POLL_S):
            self.watch.check()
        result, error = outcome
        if isinstance(error, RuntimeError) and OUT_OF_MEMORY not in str(error):
            raise self.watch.explain(error) from error
        if error is not None:
            raise error
        return result  # type: ignore[no-any-return]

    def _serve(self) -> None:
        while True:
            self._jobs.get()()

    def all_gather(self, tensor: Tensor, ranks: Sequence[int] | None = None) -> list[Tensor]:
        """The contiguous tensors of one dimension of these ranks, or of all, in order; lengths may differ."""
        return self.run(lambda: self._gather.all_gather(tensor, ranks or range(self.world)))

    def close(self, error: BaseException | None = None) -> None:
        """Leave together, or tell the others why not."""
        if error is None:
            self.run(lambda: self._gather.all_gather(torch.zeros(1), range(self.world), last=True))
            self.watch.stop()
            self._dist.destroy_process_group()
            return
        self.watch.last_words(error)
        # A thread may still wait in gloo for a rank that is gone, and would hold up the end of the process.
        atexit.register(_leave_at_once, error.exit_code if isinstance(error, UserError) else 1)


def _leave_at_once(code: int) -> None:
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)
