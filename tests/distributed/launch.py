"""Real ranks in processes of their own on 127.0.0.1: started one by one, or by torch's launcher."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
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


def start_ranks(world: int, arguments: list[str], absent: tuple[int, ...] = ()) -> list[subprocess.Popen[str]]:
    """`python ARGUMENTS` as each of `world` ranks, without a launcher; rank 0 holds the store."""
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(world)}
    return [
        subprocess.Popen(
            [sys.executable, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment(**where, RANK=str(rank), LOCAL_RANK=str(rank)),
        )
        for rank in range(world)
        if rank not in absent
    ]


def outcome(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and standard error of a process, which is killed if it does not end."""
    try:
        _, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return process.returncode, errors


def torchrun(world: int, arguments: list[str], *flags: str) -> subprocess.Popen[str]:
    """The same under torch's launcher."""
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world)]
    command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", f"127.0.0.1:{free_port()}", "--local-addr", "127.0.0.1"]
    return subprocess.Popen(
        [*command, *flags, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
