"""What a forked child does to itself on its `Plan`: signals at exact places, failing disks, records of what it did."""

from __future__ import annotations

import hashlib
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protomamba import storage as durable
from protomamba.data.prefetch import Prefetcher
from protomamba.kernels import native
from protomamba.storage import Disk
from protomamba.train import run
from protomamba.train.trainer import StepStats
from tests.reliability.forked import Plan

DISK_CALLS = ("free_bytes", "open", "write", "fsync", "close", "replace", "fsync_dir", "link", "unlink")


def install(plan: Plan) -> None:
    """Wrap what the plan names; the rest stays as it is."""
    if plan.at_batch is not None or plan.batches:
        _watch_batches(plan)
    if plan.disk_call is not None or plan.disk_calls:
        _watch_disk(plan)
    if plan.stall:
        _stall_after_stop(Path(plan.stall))
    if plan.memory:
        _watch_memory(Path(plan.memory))
    if plan.audit:
        _watch_the_world(plan.audit)
    if plan.starve:
        _starve(plan.starve)


def _watch_batches(plan: Plan) -> None:
    take = Prefetcher.__next__
    asked = 0

    def counted(self: Prefetcher) -> Any:
        nonlocal asked
        if asked == plan.at_batch:
            os.kill(os.getpid(), plan.signal)
        asked += 1
        index = self.stream.position
        batch = take(self)
        if plan.batches:
            digest = hashlib.sha256()
            for tensor in (batch.tokens_BL, batch.targets_BL, batch.reset_BL):
                digest.update(b"none" if tensor is None else tensor.numpy().tobytes())
            with open(plan.batches, "a") as file:
                file.write(f"{index} {digest.hexdigest()}\n")
        return batch

    Prefetcher.__next__ = counted  # type: ignore[method-assign]


def _watch_disk(plan: Plan) -> None:
    """Count the calls of every Disk of the process; fail or die at the planned one."""
    count = 0

    def wrap(name: str) -> None:
        real: Callable[..., Any] = getattr(Disk, name)

        def call(self: Disk, *arguments: Any) -> Any:
            nonlocal count
            here, count = count, count + 1
            if plan.disk_calls:
                with open(plan.disk_calls, "a") as file:
                    file.write(name + "\n")
            due = plan.disk_call is not None and (
                here == plan.disk_call or (plan.disk_forever and here > plan.disk_call)
            )
            if due and plan.disk_action == "kill-before":
                os.kill(os.getpid(), signal.SIGKILL)
            if due and isinstance(plan.disk_action, int):
                if name == "close":  # a close that reports an error has closed the file all the same
                    real(self, *arguments)
                raise OSError(plan.disk_action, os.strerror(plan.disk_action))
            result = real(self, *arguments)
            if due and plan.disk_action == "kill-after":
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        setattr(Disk, name, call)

    for name in DISK_CALLS:
        wrap(name)


def _stall_after_stop(marker: Path) -> None:
    """The disk hangs in the save that follows a stop request, as a dead network mount would."""
    real_commit, stops = durable.commit, []
    enter = run.StopRequest.__enter__

    def entered(self: run.StopRequest) -> run.StopRequest:
        stops.append(self)
        return enter(self)

    def commit(*arguments: Any, **options: Any) -> None:
        if stops and stops[0].requested:
            marker.touch()
            while True:
                signal.pause()
        real_commit(*arguments, **options)

    run.StopRequest.__enter__ = entered  # type: ignore[method-assign]
    from protomamba.checkpoint import file as checkpoint

    checkpoint.commit = commit  # type: ignore[attr-defined]


def _watch_memory(file: Path) -> None:
    report = run.Run._report
    page = os.sysconf("SC_PAGE_SIZE")

    def watched(self: run.Run, stats: StepStats) -> None:
        report(self, stats)
        if stats.step % 20 == 0:
            resident = int(Path("/proc/self/statm").read_text().split()[1]) * page
            with open(file, "a") as out:
                counts = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
                out.write(" ".join(map(str, (stats.step, resident, *counts))) + "\n")

    run.Run._report = watched  # type: ignore[method-assign]


def _hungry_op() -> Callable[[], None]:
    """A native op that needs 128 MB of its own, its arguments made beforehand; it is refused before it reads them."""
    library, width = native.load("baseline"), 1 << 24
    row_D, rows_TD = torch.empty(width), torch.empty(2, width)
    arguments = {"x": rows_TD, "dy": rows_TD, "dx": rows_TD, "scale": torch.empty(2), "weight": row_D, "dweight": row_D}
    return lambda: library.norm_backward(T=2, D=width, out_is_bf16=0, eps=1e-5, **arguments)


def _starve(where: str) -> None:
    """Lower the limit of the address space and need more than it, of torch, Python, numpy or a kernel."""
    from protomamba.checkpoint import file as checkpoint
    from protomamba.data.token_stream import TokenStream
    from protomamba.train.trainer import Trainer

    kind, name, need = {
        "step": (Trainer, "train_step", lambda: torch.empty(1 << 28)),
        "kernel": (Trainer, "train_step", _hungry_op() if where == "kernel" else None),
        "save": (checkpoint, "save", lambda: bytearray(1 << 30)),
        "worker": (TokenStream, "batch", lambda: np.empty(1 << 27)),
    }[where]
    real, calls = getattr(kind, name), 0

    def starved(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            size = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
            resource.setrlimit(resource.RLIMIT_AS, (size + (64 << 20), resource.RLIM_INFINITY))
        return (need(), real(*arguments, **options))[1] if calls >= 3 else real(*arguments, **options)

    setattr(kind, name, starved)


CHANGING = {"os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
RUNNING = ("subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.fork", "pickle.find_class", "ctypes.dlopen")


def _watch_the_world(path: str) -> None:
    """Write a line for everything the interpreter reports that changes files, speaks to a network, or runs code.

    Python's audit events: no code of ours, and none it calls in Python, gets around them.
    """
    out = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            name, _, flags = arguments
            writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if writes and not isinstance(name, int):
                os.write(out, f"write {os.path.abspath(os.fsdecode(name))}\n".encode())
        elif event in CHANGING:
            places = [os.path.abspath(os.fsdecode(a)) for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            for place in places:
                os.write(out, f"write {place}\n".encode())
        elif event.startswith("socket.") and event != "socket.gethostname":  # the lock notes it; nothing is sent
            os.write(out, f"network {event} {arguments!r}\n".encode())
        elif event.startswith(RUNNING):
            os.write(out, f"run {event} {arguments!r}\n".encode())
        elif event == "exec":
            # A module's body as well: `import` itself is reported only where a statement does it.
            os.write(out, f"import {getattr(arguments[0], 'co_filename', '')}\n".encode())

    sys.addaudithook(hook)
