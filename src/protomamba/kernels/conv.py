"""causal_conv: shape checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.native import Library, mask_view, pointer, view


def causal_conv(
    u_BLE: Tensor,
    weight_E1K: Tensor,
    bias_E: Tensor | None = None,
    initial_state_BKE: Tensor | None = None,
    return_last_state: bool = False,
    reset_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution and SiLU: see `reference.causal_conv`, which this equals.

    Native for float32 and bfloat16 (weights, bias and state stay float32), whatever the strides of the first two
    dimensions. ValueError for shapes that do not fit.
    """
    sizes = check_shapes("causal_conv", u_BLE=u_BLE, weight_E1K=weight_E1K, bias_E=bias_E, reset_BL=reset_BL)
    if sizes["K"] > 1:
        history = {"B": sizes["B"], "H": sizes["K"] - 1, "E": sizes["E"]}
        check_shapes("causal_conv", sizes=history, initial_state_BHE=initial_state_BKE)
    library = native.select("causal_conv", u_BLE)
    if library is None:
        return reference.causal_conv(u_BLE, weight_E1K, bias_E, initial_state_BKE, return_last_state, reset_BL)
    wide = [None if x is None else x.float().contiguous() for x in (weight_E1K, bias_E, initial_state_BKE)]
    reset = None if reset_BL is None else reset_BL.bool().contiguous()
    y_BLE, last_BKE = _Conv.apply(library, return_last_state, reset, native.rows(u_BLE), *wide)
    return (y_BLE, last_BKE) if return_last_state else y_BLE


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, library: Library, want_last: bool, reset: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        y, last = conv_forward(library, reset, *tensors, want_last=want_last)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(reset, *tensors)
        ctx.library = library
        return y, last

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, u, *wide = ctx.saved_tensors
        dy = torch.zeros_like(u) if dy is None else native.rows(dy)
        dlast = None if dlast is None else dlast.contiguous()
        du = torch.empty(u.shape, dtype=u.dtype)
        grads = (None, None, None, du, *conv_backward(ctx.library, reset, u, *wide, dy, dlast, du=du))
        return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True))


def conv_forward(
    library: Library,
    reset: Tensor | None,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    *,
    want_last: bool,
) -> tuple[Tensor, Tensor | None]:
    """y and the last state if wanted. Lanes of u adjacent; weight, bias and state contiguous float32."""
    n_batch, length, width = u.shape
    taps = weight.shape[-1]
    y = torch.empty(u.shape, dtype=u.dtype)
    last = torch.empty(n_batch, taps - 1, width) if want_last else None
    library.call(
        "conv_forward",
        n_batch, length, width, taps, u.dtype == torch.bfloat16,
        *view(u), *view(y), *mask_view(reset),
        pointer(weight), pointer(bias), pointer(initial), pointer(last),
        *(0,) * 10,
    )  # fmt: skip
    return y, last


def conv_backward(
    library: Library,
    reset: Tensor | None,
    u: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    *,
    du: Tensor,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes du, with any strides of its rows; returns the gradients of weight, bias and initial."""
    n_batch, length, width = u.shape
    dweight, dbias, dinitial = (None if x is None else torch.empty_like(x) for x in (weight, bias, initial))
    library.call(
        "conv_backward",
        n_batch, length, width, weight.shape[-1], u.dtype == torch.bfloat16,
        *view(u), 0, 0, 0, *mask_view(reset),
        pointer(weight), pointer(bias), pointer(initial), 0,
        *view(dy), *view(du), pointer(dlast), pointer(dweight), pointer(dbias), pointer(dinitial),
    )  # fmt: skip
    assert dweight is not None
    return dweight, dbias, dinitial
