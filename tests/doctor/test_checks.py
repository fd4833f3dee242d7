"""What doctor finds, and what it advises."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from protomamba.bench.timing import Samples
from protomamba.cli.main import main
from protomamba.doctor import checks
from protomamba.doctor.checks import Finding, findings, measured, memory_finding, missing_extras, threads_finding
from protomamba.kernels import blas, matmul, native
from protomamba.machine import Limits

FREE = Limits(None, None)
GIB = 1 << 30


def by_name() -> dict[str, Finding]:
    native.set_level(None)  # forgets what the environment said before
    matmul.backend.cache_clear()
    return {finding.what: finding for finding in findings()}


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Each test finds the environment's choices unmade, and leaves none of its own behind."""
    backend = matmul.backend
    with monkeypatch.context() as patch:
        patch.setattr(native, "_mode", native._mode)
        patch.delenv("PROTOMAMBA_KERNELS", raising=False)
        patch.delenv("PROTOMAMBA_CPU_LEVEL", raising=False)
        yield
    monkeypatch.undo()
    native.set_level(None)
    backend.cache_clear()


@pytest.mark.parametrize(
    ("threads", "cpus", "cores", "limits", "state", "advice"),
    [
        (2, 2, 2, FREE, "ok", ""),
        (8, 8, 8, Limits(2.0, None), "slow", "--threads 2"),
        (2, 8, 8, Limits(0.5, None), "slow", "--threads 1"),
        (1, 8, 8, Limits(0.5, None), "ok", ""),
        (1, 4, 4, FREE, "note", "try --threads 4"),
        (4, 8, 4, FREE, "ok", ""),
        (16, 8, 4, FREE, "slow", "--threads 4"),
    ],
)
def test_threads(threads: int, cpus: int, cores: int, limits: Limits, state: str, advice: str) -> None:
    found = threads_finding(threads, cpus, cores, limits)
    assert (found.state, found.advice) == (state, advice)


@pytest.mark.parametrize(
    ("free", "limits", "state"),
    [(8 * GIB, FREE, "ok"), (GIB // 2, FREE, "slow"), (8 * GIB, Limits(None, GIB // 2), "slow")],
)
def test_memory(free: int, limits: Limits, state: str) -> None:
    assert memory_finding({"MemTotal": 16 * GIB, "MemAvailable": free}, limits).state == state
    assert memory_finding({}, limits).state == "note"


def test_a_lower_level_and_a_wrong_one_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    if not native.available()[0] or native.load("baseline").cpu_level == 0:
        pytest.skip("needs native kernels and a CPU above baseline")
    monkeypatch.setattr(native, "_mode", "auto")
    assert by_name()["CPU level"].state == "ok"
    monkeypatch.setenv("PROTOMAMBA_CPU_LEVEL", "baseline")
    assert by_name()["CPU level"] == Finding(
        "CPU level", "slow", f"baseline, though {native.levels()[0]} is built", "unset PROTOMAMBA_CPU_LEVEL"
    )
    monkeypatch.setenv("PROTOMAMBA_CPU_LEVEL", "avx9")
    assert by_name()["kernels"].state == "slow" and "avx9" in by_name()["kernels"].found


def test_a_level_that_is_not_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not native.available()[0] or native.load("baseline").cpu_level == 0:
        pytest.skip("needs native kernels and a CPU above baseline")
    (library,) = native.library_dir().glob("libprotomamba_baseline.*")
    (tmp_path / library.name).symlink_to(library)
    monkeypatch.setenv("PROTOMAMBA_LIBRARY_DIR", str(tmp_path))
    monkeypatch.setattr(native, "_mode", "auto")
    native.load.cache_clear()
    try:
        level = by_name()["CPU level"]
        assert (
            level.state == "slow"
            and "for which no library was built" in level.found
            and "pip install -e ." in level.advice
        )
    finally:
        native.load.cache_clear()


def test_no_kernels_and_the_forced_reference_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PROTOMAMBA_KERNELS", "reference")
    if native.available()[0]:
        assert by_name()["kernels"] == Finding("kernels", "slow", "PROTOMAMBA_KERNELS=reference", "unset it")
    monkeypatch.setenv("PROTOMAMBA_LIBRARY_DIR", str(tmp_path))
    native.load.cache_clear()
    try:
        found = by_name()["kernels"]
        assert found.state == "slow" and str(tmp_path) in found.found
    finally:
        native.load.cache_clear()


@pytest.mark.parametrize(
    ("version", "cuda", "state", "words"),
    [
        ("2.13.0+cpu", None, "ok", "2.13.0"),
        ("2.14.1+cpu", None, "slow", "#193951"),
        ("2.13.0+cu130", "13.0", "note", "CUDA 13.0"),
    ],
)
def test_torch(monkeypatch: pytest.MonkeyPatch, version: str, cuda: str | None, state: str, words: str) -> None:
    monkeypatch.setattr(torch, "__version__", version)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    found = by_name()["torch"]
    assert found.state == state and words in found.found


def test_a_wrong_choice_of_products_and_settings_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROTOMAMBA_MATMUL", "mlk")
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    found = by_name()
    assert found["matrix products"].state == "slow" and "'mlk'" in found["matrix products"].found
    assert found["torch's level"].advice and "PROTOMAMBA_MATMUL=mlk" in found["environment"].found
    matmul.backend.cache_clear()


def test_missing_extras_are_named_with_their_command(monkeypatch: pytest.MonkeyPatch) -> None:
    needs = ["torch>=2.10", "torch>=2; extra == 'jax'", "no-such-a (>=1) ; extra == 'jax'", 'no.b; extra == "x-y"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: [*needs, "no-such-c; extra == 'dev'"])
    assert missing_extras() == {"jax": ["no-such-a"], "x-y": ["no.b"]}
    assert by_name()["extra jax"] == Finding("extra jax", "missing", "no-such-a", "pip install 'protomamba[jax]'")


def test_a_busy_machine_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks.os, "getloadavg", lambda: (512.0, 1.0, 1.0))
    assert by_name()["load"].state == "slow"
    monkeypatch.setattr(checks.os, "getloadavg", lambda: (0.0, 0.0, 0.0))
    assert "load" not in by_name()


def test_a_faster_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    (finding,) = measured()
    assert finding.what == "products, measured" and "torch" in finding.found and "GFLOP/s" in finding.found
    samples = Samples({"torch": [0.02], "onednn": [0.01]})
    monkeypatch.setattr("protomamba.bench.timing.interleave", lambda runs, rounds: samples)
    monkeypatch.setattr(matmul, "backend", lambda: "torch")
    (finding,) = measured()
    assert (finding.state, finding.advice) == ("slow", "PROTOMAMBA_MATMUL=onednn")
    monkeypatch.setattr(matmul, "backend", lambda: "onednn")
    assert [finding.state for finding in measured()] == ["ok"]


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:2] == ["ok", "protomamba"] and "training slower" in lines[-1]
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["findings"]
    assert {finding["what"] for finding in found} >= {"kernels", "matrix products", "torch", "threads", "memory"}
    assert {finding["state"] for finding in found} <= {"ok", "slow", "missing", "note"}


def test_what_the_kernels_set_themselves_is_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in blas.PRODUCTS_KEPT.items():
        monkeypatch.setenv(name, value)
    assert "environment" not in by_name() or "CAPACITY" not in by_name()["environment"].found
    monkeypatch.setenv("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "7")
    assert "ONEDNN_PRIMITIVE_CACHE_CAPACITY=7" in by_name()["environment"].found
