"""What the system lets this process use: processors, and the limits of its control groups (Linux; v1 and v2)."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# v1 writes "no limit" as the largest page-aligned int64.
_UNLIMITED_V1 = 1 << 62


@dataclass(frozen=True)
class Limits:
    """Processors (may be a fraction) and bytes; None where there is no limit."""

    cpus: float | None
    memory_bytes: int | None


def group_limits(root: Path = Path("/")) -> Limits:
    """The tightest limits of this process's control groups and of all above them.

    root: where /proc and /sys are found. Kernel documentation: cgroup-v2.rst (cpu.max, memory.max), and v1's
    cpu.cfs_quota_us and memory.limit_in_bytes.
    """
    cpus, memory = [], []
    for controllers, path in _memberships(root / "proc/self/cgroup"):
        for folder in _upwards(root, controllers, path):
            cpus += _cpu_limit(folder)
            memory += _memory_limit(folder)
    return Limits(min(cpus, default=None), min(memory, default=None))


def _memberships(file: Path) -> Iterator[tuple[str, str]]:
    """(controllers, path) of each hierarchy: "0::/path" for v2, "4:cpu,cpuacct:/path" for v1."""
    for line in _text(file).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers in ("", "memory") or "cpu" in controllers.split(","):
            yield controllers, path


def _upwards(root: Path, controllers: str, path: str) -> Iterator[Path]:
    """The group's folder and those above it. A container may have the group itself as the top."""
    for top in (root / "sys/fs/cgroup" / controllers, root / "sys/fs/cgroup"):
        folder = top / path.strip("/")
        while top in (folder, *folder.parents):
            yield folder
            folder = folder.parent


def _cpu_limit(folder: Path) -> list[float]:
    fields = _text(folder / "cpu.max").split()
    quota, period = (
        fields if len(fields) == 2 else (_text(folder / f"cpu.cfs_{x}_us").strip() for x in ("quota", "period"))
    )
    if not quota.isdecimal() or not period.isdecimal():  # "max", -1, or no such file
        return []
    return [int(quota) / int(period)]


def _memory_limit(folder: Path) -> list[int]:
    found = [_text(folder / name).strip() for name in ("memory.max", "memory.limit_in_bytes")]
    return [int(text) for text in found if text.isdecimal() and int(text) < _UNLIMITED_V1]


def process_start(root: Path = Path("/")) -> float:
    """When this process began, on the clock of time.perf_counter; now, where the system does not say.

    The 22nd field of /proc/self/stat, in clock ticks since the boot (proc_pid_stat(5)); a name in it may hold spaces.
    """
    now = time.perf_counter()
    fields = _text(root / "proc/self/stat").rpartition(")")[2].split()
    if len(fields) < 20 or not hasattr(time, "CLOCK_BOOTTIME"):
        return now
    ticks = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return now - max(0.0, time.clock_gettime(time.CLOCK_BOOTTIME) - ticks)


def _text(file: Path) -> str:
    try:
        return file.read_text()
    except OSError:
        return ""


def machine_name(root: Path = Path("/")) -> str:
    """What no other machine is called: the number of this boot of its system, where there is one, else the host's name.

    Hosts may all be called "localhost", and the containers of one machine are not called the same.
    """
    return _text(root / "proc/sys/kernel/random/boot_id").strip() or os.uname().nodename


def allowed_cpus() -> set[int]:
    """The processors that the scheduler may put this process on."""
    if hasattr(os, "sched_getaffinity"):
        return os.sched_getaffinity(0)
    return set(range(os.cpu_count() or 1))


def by_core(cpus: set[int], root: Path = Path("/")) -> list[list[int]]:
    """These processors, those of one core together (they share its arithmetic units), those of one socket in a row."""
    cores: dict[tuple[int, str], list[int]] = {}
    for cpu in sorted(cpus):
        topology = root / f"sys/devices/system/cpu/cpu{cpu}/topology"
        socket = _text(topology / "physical_package_id").strip()
        siblings = _text(topology / "thread_siblings_list").strip() or str(cpu)
        cores.setdefault((int(socket) if socket.isdecimal() else 0, siblings), []).append(cpu)
    return [core for _, core in sorted(cores.items(), key=lambda item: item[0][0])]


def memory_info(root: Path = Path("/")) -> dict[str, int]:
    """/proc/meminfo in bytes, by name; empty where there is none."""
    found = {}
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, rest = line.partition(":")
        found[name] = int(rest.split()[0]) * 1024
    return found
