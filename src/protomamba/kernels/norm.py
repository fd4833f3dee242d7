"""rms_norm and add_rms_norm: shape checks, and their gradient on the native kernels. Definitions in `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes, rows_of
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.native import Library


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last of any number of dimensions; native for float32."""
    x_TD = rows_of("rms_norm", "x_BLD", x_BLD)
    check_shapes("rms_norm", x_TD=x_TD, weight_D=weight_D)
    library = native.select("rms_norm", x_BLD, (torch.float32,))
    if library is None:
        return reference.rms_norm(x_BLD, weight_D, eps)
    y_TD: Tensor
    y_TD, _ = native.apply(_Norm, library, eps, x_TD.contiguous(), None, weight_D.float().contiguous())
    return y_TD.view(x_BLD.shape)


def add_rms_norm(x_BLD: Tensor, residual_BLD: Tensor, weight_D: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass; native for float32."""
    x_TD, residual_TD = (
        rows_of("add_rms_norm", name, x) for name, x in (("x_BLD", x_BLD), ("residual_BLD", residual_BLD))
    )
    check_shapes("add_rms_norm", x_TD=x_TD, residual_TD=residual_TD, weight_D=weight_D)
    library = native.select("add_rms_norm", x_BLD, (torch.float32,))
    if library is None or residual_BLD.dtype != torch.float32:
        return reference.add_rms_norm(x_BLD, residual_BLD, weight_D, eps)
    weight = weight_D.float().contiguous()
    y_TD, total_TD = native.apply(_Norm, library, eps, x_TD.contiguous(), residual_TD.contiguous(), weight)
    return y_TD.view(x_BLD.shape), total_TD.view(x_BLD.shape)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Library, eps: float, x: Tensor, residual: Tensor | None, weight: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        y, total, scale = norm_forward(library, x, weight, eps, torch.float32, residual)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x if total is None else total, weight, scale)
        ctx.library = library
        return y, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dtotal: Tensor | None) -> tuple[Tensor | None, ...]:
        total, weight, scale = ctx.saved_tensors
        _, _, _, needs_residual, needs_weight = ctx.needs_input_grad
        dy = torch.zeros_like(total) if dy is None else dy.contiguous()
        dtotal = None if dtotal is None else dtotal.contiguous()
        dx, dweight = norm_backward(ctx.library, total, weight, scale, dy, dtotal, needs_weight)
        return None, None, dx, dx.clone() if needs_residual else None, dweight


def norm_forward(
    library: Library, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype, residual: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Of contiguous float32 (T, D): the norm in `dtype`, x + residual if there is one, and 1 / rms (T,)."""
    n_token, width = x.shape
    y, scale = torch.empty(n_token, width, dtype=dtype), native.floats(n_token)
    total = None if residual is None else torch.empty_like(x)
    library.norm_forward(
        T=n_token, D=width, out_is_bf16=dtype == torch.bfloat16, eps=eps,
        x=x, residual=residual, weight=weight, y=y, total=total, scale=scale,
    )  # fmt: skip
    return y, total, scale


def norm_backward(
    library: Library,
    total: Tensor,
    weight: Tensor,
    scale: Tensor,
    dy: Tensor,
    dtotal: Tensor | None,
    needs_weight: bool,
) -> tuple[Tensor, Tensor | None]:
    """The gradient of the sum, `dtotal` added, and that of the weight if needed."""
    n_token, width = total.shape
    dx, dweight = torch.empty_like(total), torch.empty_like(weight) if needs_weight else None
    library.norm_backward(
        T=n_token, D=width, out_is_bf16=dy.dtype == torch.bfloat16, eps=0.0,
        x=total, weight=weight, scale=scale, dy=dy, dtotal=dtotal, dx=dx, dweight=dweight,
    )  # fmt: skip
    return dx, dweight
