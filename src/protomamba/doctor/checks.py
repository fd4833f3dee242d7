"""The findings: one small function for each thing that makes training slow or a command unusable."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from protomamba import __version__
from protomamba.errors import ConfigError
from protomamba.kernels import blas, matmul, native
from protomamba.machine import Limits, allowed_cpus, by_core, group_limits, memory_info

# Installed by contributors, not needed to use anything.
NOT_FOR_USERS = frozenset({"dev"})
SETTINGS = re.compile(r"(PROTOMAMBA|OMP|MKL|KMP|ONEDNN|DNNL|ATEN|GOTO|OPENBLAS)_\w+")
GIB = 1 << 30
# torch 2.14 and later: products of some shapes up to 6.6 times slower on CPUs (pytorch/pytorch#193951).
SLOW_TORCH = (2, 14)


@dataclass(frozen=True)
class Finding:
    """state: ok, slow (costs time), missing (something cannot be used), note. advice: what to do, or empty."""

    what: str
    state: str
    found: str
    advice: str = ""


def findings() -> list[Finding]:
    """All checks, in the order of what costs most."""
    return [finding for check in CHECKS for finding in check()]


def _kernels() -> Iterator[Finding]:
    try:
        found, why = native.available()
    except ConfigError as error:
        yield Finding("kernels", "slow", str(error), "unset PROTOMAMBA_CPU_LEVEL")
        return
    forced = os.environ.get("PROTOMAMBA_KERNELS")
    if not found:
        yield Finding("kernels", "slow", f"the reference path is used: {why}", "pip install -e . with a C++ compiler")
    elif forced == "reference":
        yield Finding("kernels", "slow", "PROTOMAMBA_KERNELS=reference", "unset it")
    else:
        yield Finding("kernels", "ok", f"native, in {native.library_dir()}")
        yield from _age()
        yield _level()


def _age() -> Iterator[Finding]:
    """In a checkout: whether the sources have changed since the libraries were built."""
    sources = [file.stat().st_mtime for file in (native.library_dir() / "csrc").glob("*")]
    built = [file.stat().st_mtime for file in native.library_dir().glob("libprotomamba_*")]
    if sources and built and max(sources) > min(built):
        yield Finding("kernels' age", "note", "the sources in csrc are newer than the libraries", "pip install -e .")


def _level() -> Finding:
    used, built = native.select("doctor", native.floats(0)), native.levels()
    assert used is not None  # the kernels were found to be available
    highest = native.LEVELS[used.cpu_level]
    if used.level == highest:
        return Finding("CPU level", "ok", f"{used.level}, the highest level that this CPU has and protomamba supports")
    if highest in built:
        return Finding("CPU level", "slow", f"{used.level}, though {highest} is built", "unset PROTOMAMBA_CPU_LEVEL")
    advice = "pip install -e . with a compiler that knows it (GCC 11 or newer)"
    return Finding("CPU level", "slow", f"{used.level}: this CPU has {highest}, for which no library was built", advice)


def _torch() -> Iterator[Finding]:
    version, cuda = torch.__version__, torch.version.cuda
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers >= SLOW_TORCH:
        found = f"{version}: since 2.14 some products on CPUs are up to 6.6 times slower (pytorch/pytorch#193951)"
        yield Finding("torch", "slow", found, "pip install 'torch<2.14', or compare with protomamba bench")
    elif cuda:
        yield Finding("torch", "note", f"{version}, built for CUDA {cuda}: not faster here, and gigabytes larger")
    else:
        yield Finding("torch", "ok", version)
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        yield Finding("oneDNN", "slow", "this torch was built without it", "install the official wheel of torch")
    yield from _capability()


def _capability() -> Iterator[Finding]:
    """Torch's own kernels (products in bf16, element-wise operations) may be held at a lower level than the CPU has."""
    held = os.environ.get("ATEN_CPU_CAPABILITY")
    if held:
        found = f"{torch.backends.cpu.get_cpu_capability()}, because of ATEN_CPU_CAPABILITY={held}"
        yield Finding("torch's level", "note", found, "unset it to use the highest level")


def _matmul() -> Iterator[Finding]:
    try:
        chosen = matmul.backend()
    except ConfigError as error:
        yield Finding("matrix products", "slow", str(error), "unset PROTOMAMBA_MATMUL")
        return
    why = "PROTOMAMBA_MATMUL" if os.environ.get("PROTOMAMBA_MATMUL") else "the rule for this CPU"
    mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    name = {"native": "our kernel", "onednn": "oneDNN", "torch": "torch (MKL)" if mkl else "torch"}[chosen]
    yield Finding("matrix products", "ok", f"float32 by {name}, {why}")


def _threads() -> Iterator[Finding]:
    yield threads_finding(torch.get_num_threads(), len(allowed_cpus()), len(by_core(allowed_cpus())), group_limits())
    load = os.getloadavg()[0]
    if load > len(allowed_cpus()):
        found = f"load {load:.1f} on {len(allowed_cpus())} processors: other programs are using them"
        yield Finding("load", "slow", found, "wait, or stop them; bench with --clock cpu")


def threads_finding(threads: int, cpus: int, cores: int, limits: Limits) -> Finding:
    """Whether torch's threads suit the processors that this process may use."""
    facts = f"{threads} of torch on {cpus} processors ({cores} cores)"
    if limits.cpus is not None:
        facts += f", limited to {limits.cpus:g} by a control group"
    usable = min(cpus, limits.cpus if limits.cpus is not None else cpus)
    best = max(1, int(min(cores, usable)))
    if threads > max(1, usable):
        found = f"{facts}: threads wait for each other when the group is throttled"
        return Finding("threads", "slow", found, f"--threads {best}")
    if threads < best:
        return Finding("threads", "note", f"{facts}: {best - threads} not used", f"try --threads {best}")
    return Finding("threads", "ok", facts)


def _memory() -> Iterator[Finding]:
    yield memory_finding(memory_info(), group_limits())


def memory_finding(info: dict[str, int], limits: Limits) -> Finding:
    """How much memory a run can have; a warning if it is little, because the system kills a process that exceeds it."""
    total, free = info.get("MemTotal"), info.get("MemAvailable")
    if total is None or free is None:
        return Finding("memory", "note", "unknown on this system")
    facts = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free"
    if limits.memory_bytes is not None and limits.memory_bytes < total:
        facts += f"; a control group allows {limits.memory_bytes / GIB:.1f} GiB"
    if min(free, limits.memory_bytes or free) < GIB:
        return Finding("memory", "slow", f"{facts}: a run may be killed", "smaller --batch-size and --seq-len")
    return Finding("memory", "ok", facts)


def _settings() -> Iterator[Finding]:
    ours = blas.PRODUCTS_KEPT.items()  # set by the kernels where nobody else did
    found = sorted(name for name, value in os.environ.items() if SETTINGS.fullmatch(name) and (name, value) not in ours)
    if found:
        yield Finding("environment", "note", " ".join(f"{name}={os.environ[name]}" for name in found))


def _extras() -> Iterator[Finding]:
    for extra, missing in missing_extras().items():
        yield Finding(f"extra {extra}", "missing", ", ".join(missing), f"pip install 'protomamba[{extra}]'")


def missing_extras() -> dict[str, list[str]]:
    """For each extra of ours that is not complete: the packages that are not installed."""
    try:
        requirements = importlib.metadata.requires("protomamba") or []
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path, never installed
        return {}
    missing: dict[str, list[str]] = {}
    for requirement in requirements:
        match = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", requirement)
        if match and match[2] not in NOT_FOR_USERS and not _installed(match[1]):
            missing.setdefault(match[2], []).append(match[1])
    return missing


def _installed(distribution: str) -> bool:
    try:
        importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _python() -> Iterator[Finding]:
    where = Path(__file__).resolve().parents[1]
    system = f"{platform.system()} {platform.machine()}"
    yield Finding("protomamba", "ok", f"{__version__} in {where}, python {platform.python_version()}, {system}")


def measured() -> Iterator[Finding]:
    """A second of measuring: the products by all that can make them."""
    from protomamba.bench.timing import interleave

    torch.manual_seed(0)
    x, w = torch.randn(512, 512), torch.randn(512, 512)
    by_name = {name: partial(linear, x, w) for name, linear in matmul.linear_by_name().items()}
    samples = interleave(by_name, rounds=5)
    speeds = {name: 2 * 512**3 / samples.median(name) / 1e9 for name in samples.seconds}
    chosen, best = matmul.backend(), max(speeds, key=speeds.__getitem__)
    facts = ", ".join(f"{name} {speed:.0f} GFLOP/s" for name, speed in speeds.items())
    slow = speeds[best] > 1.3 * speeds[chosen]
    yield Finding("products, measured", "slow" if slow else "ok", facts, f"PROTOMAMBA_MATMUL={best}" if slow else "")


CHECKS: tuple[Callable[[], Iterator[Finding]], ...] = (
    _python,
    _kernels,
    _matmul,
    _torch,
    _threads,
    _memory,
    _settings,
    _extras,
)
