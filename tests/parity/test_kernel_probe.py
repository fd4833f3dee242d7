"""The kernel probe holds on this machine, and sees a kernel that is off by more than its tolerance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba import kernels
from protomamba.errors import UserError
from protomamba.kernels import native
from protomamba.kernels.cases import CASES
from protomamba.parity.kernels import run

needs_native = pytest.mark.skipif(not native.available()[0], reason="no native kernels here")


@needs_native
def test_every_op_at_every_level_holds() -> None:
    report = run(seed=1, random_shapes=2)
    rows = {f"{level}: {name}" for level in native.levels() for name in CASES}
    gradients = {f"{row}, gradients" for row in rows if CASES[row.partition(": ")[2]].differentiable}
    assert report.ok and {row.name for row in report.rows} == rows | gradients


@needs_native
def test_a_kernel_that_is_off_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    right = kernels.rms_norm

    def wrong(x_BLD: Tensor, weight_D: Tensor, eps: float = 1e-5) -> Tensor:
        return right(x_BLD, weight_D, eps) * (1 + 1e-4 * torch.ones(()))

    monkeypatch.setattr(kernels, "rms_norm", wrong)
    report = run(seed=1)
    assert {row.name.partition(": ")[2] for row in report.rows if not row.ok} == {"rms_norm", "rms_norm, gradients"}


def test_without_native_kernels_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "available", lambda: (False, "no library"))
    with pytest.raises(UserError, match="no library"):
        run(seed=1)
