"""Every kernel test runs with uninitialised memory full of NaN, and leaves the choice of path as it found it."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from protomamba.kernels import native

FORCED_REFERENCE = os.environ.get("PROTOMAMBA_KERNELS") == "reference"
LEVELS = [] if FORCED_REFERENCE else native.levels()


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(params=LEVELS or ["reference"])
def level(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every path there is: each CPU level that can run here, or the reference where nothing else can (or may)."""
    before = native.get_kernels()
    native.set_kernels("native" if LEVELS else "reference")
    native.set_level(request.param if LEVELS else None)
    yield request.param
    native.set_level(None)
    native.set_kernels(before)


@pytest.fixture
def library(level: str) -> native.Library:
    if not LEVELS:
        pytest.skip("no native kernels on this path")
    return native.load(level)
