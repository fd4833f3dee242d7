"""Real ranks in processes of their own on 127.0.0.1: started one by one, or by torch's launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_S = 240
ROOT = Path(__file__).resolve().parents[2]


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo", **more}


# Holds the store, as the launcher's agent does, so that it outlives every rank.
STORE = """
import sys, torch.distributed as dist
store = dist.TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
sys.stdin.read()
"""


@contextmanager
def started(world: int, arguments: list[str], absent: tuple[int, ...] = ()) -> Iterator[list[subprocess.Popen[str]]]:
    """`python ARGUMENTS` as each of `world` ranks, by hand; all that still run are killed at the end."""
    port = str(free_port())
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    processes = [_start(["-c", STORE, port], {})]
    try:
        for rank in (rank for rank in range(world) if rank not in absent):
            processes.append(_start(arguments, {**where, "WORLD_SIZE": str(world), "RANK": str(rank)}))
        yield processes[1:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def _start(arguments: list[str], variables: dict[str, str]) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = [sys.executable, *arguments]
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, env=environment(**variables))


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error of a process, which is killed if it does not end."""
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return process.returncode, errors


def torchrun(world: int, arguments: list[str], *flags: str, **variables: str) -> subprocess.Popen[str]:
    """The same under torch's launcher, as the head of a process group of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    pipe, env = subprocess.PIPE, environment(**variables)
    return subprocess.Popen(
        [*command, *flags, *arguments], stdout=pipe, stderr=pipe, text=True, env=env, start_new_session=True
    )
