"""Limits of control groups, read from files laid out as the kernel does."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from protomamba.machine import Limits, allowed_cpus, by_core, group_limits, machine_name, memory_info, process_start


def tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


@pytest.mark.parametrize(
    ("files", "limits"),
    [
        ({}, Limits(None, None)),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000\n",
                "sys/fs/cgroup/pod/box/memory.max": "max\n",
            },
            Limits(None, None),
        ),
        (
            {
                "proc/self/cgroup": "0::/pod/box\n",
                "sys/fs/cgroup/pod/cpu.max": "150000 100000\n",
                "sys/fs/cgroup/pod/box/cpu.max": "400000 100000\n",
                "sys/fs/cgroup/pod/box/memory.max": "1073741824\n",
            },
            Limits(1.5, 1 << 30),
        ),
        (  # a container that sees its own group as the top
            {"proc/self/cgroup": "0::/not/mounted\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"},
            Limits(0.5, None),
        ),
        (
            {
                "proc/self/cgroup": "5:memory:/a\n4:cpu,cpuacct:/a\n1:name=systemd:/\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_quota_us": "200000\n",
                "sys/fs/cgroup/cpu,cpuacct/a/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n",
                "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712\n",
                "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "4096\n",
            },
            Limits(2.0, 4096),
        ),
    ],
    ids=["none", "v2-unlimited", "v2-tightest-above", "v2-in-a-container", "v1"],
)
def test_the_tightest_limit_counts(tmp_path: Path, files: dict[str, str], limits: Limits) -> None:
    assert group_limits(tree(tmp_path, files)) == limits


def test_cores_and_memory(tmp_path: Path) -> None:
    siblings = {
        f"sys/devices/system/cpu/cpu{i}/topology/thread_siblings_list": f"{i % 2},{i % 2 + 2}\n" for i in range(4)
    }
    root = tree(tmp_path, {**siblings, "proc/meminfo": "MemTotal: 2048 kB\nMemAvailable:  1024 kB\n"})
    assert by_core({0, 1, 2, 3}, root) == [[0, 2], [1, 3]] and by_core({0, 2}, root) == [[0, 2]]
    assert by_core({0, 1, 2}, tmp_path / "none") == [[0], [1], [2]]
    assert memory_info(root) == {"MemTotal": 2 << 20, "MemAvailable": 1 << 20} and memory_info(tmp_path / "none") == {}
    assert allowed_cpus()


def test_cores_of_one_socket_are_in_a_row(tmp_path: Path) -> None:
    sockets = {f"sys/devices/system/cpu/cpu{i}/topology/physical_package_id": f"{i % 2}\n" for i in range(4)}
    assert by_core({0, 1, 2, 3}, tree(tmp_path, sockets)) == [[0], [2], [1], [3]]


def test_a_machine_is_its_boot_not_its_hosts_name(tmp_path: Path) -> None:
    assert machine_name(tmp_path) == os.uname().nodename
    assert machine_name(tree(tmp_path, {"proc/sys/kernel/random/boot_id": "4f7e\n"})) == "4f7e"


def test_when_the_process_began(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(time, "perf_counter", lambda: 50.0)
    monkeypatch.setattr(time, "clock_gettime", lambda clock: 1_000.0)
    assert process_start(tmp_path) == 50  # no /proc: from now
    (tmp_path / "proc/self").mkdir(parents=True)
    ticks = 997 * os.sysconf("SC_CLK_TCK")  # three seconds ago
    (tmp_path / "proc/self/stat").write_text(f"7 (a ) b) R {' '.join(['1'] * 18)} {ticks} 5 6\n")
    assert process_start(tmp_path) == 47
