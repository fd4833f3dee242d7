"""rms_norm and add_rms_norm against their twins in float64, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba.kernels import add_rms_norm, reference, rms_norm

from .compare import compare

SHAPES = [(5, 7, 24), (1, 1, 3), (3, 2, 130), (40, 64)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rms_norm(level: str, shape: tuple[int, ...]) -> None:
    def op(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (rms_norm(x, w, 1e-5),)

    def twin(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return (reference.rms_norm(x, w, 1e-5),)

    compare(op, twin, {"x": torch.randn(shape), "w": torch.randn(shape[-1])})


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_add_rms_norm(level: str, shape: tuple[int, ...]) -> None:
    """Both results carry a gradient: the sum goes on along the residual stream."""

    def op(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return add_rms_norm(x, residual, w)

    def twin(x: Tensor, residual: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return reference.add_rms_norm(x, residual, w)

    compare(op, twin, {"x": torch.randn(shape), "residual": torch.randn(shape), "w": torch.randn(shape[-1])})


def test_a_zero_row_has_a_finite_gradient(level: str) -> None:
    x_TD = torch.zeros(3, 20, requires_grad=True)
    y_TD = rms_norm(x_TD, torch.ones(20))
    (dx_TD,) = torch.autograd.grad(y_TD.sum(), x_TD)
    assert torch.equal(y_TD, torch.zeros(3, 20)) and dx_TD.isfinite().all()


def test_shapes_that_do_not_fit(level: str) -> None:
    with pytest.raises(ValueError, match=r"rms_norm: weight_D: expected shape \(D=20\), got \(21,\)"):
        rms_norm(torch.randn(3, 20), torch.ones(21))
