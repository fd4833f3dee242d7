"""causal_conv: shape checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.native import Library


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
        check_shapes("causal_conv", sizes=history, like=u_BLE, initial_state_BHE=initial_state_BKE)
    library = native.select("causal_conv", u_BLE)
    if library is None:
        return reference.causal_conv(u_BLE, weight_E1K, bias_E, initial_state_BKE, return_last_state, reset_BL)
    weight = weight_E1K.float().contiguous()
    bias, initial = (None if x is None else x.float().contiguous() for x in (bias_E, initial_state_BKE))
    inputs = ConvInputs(native.rows(u_BLE), weight, bias, initial)
    reset = None if reset_BL is None else reset_BL.bool().contiguous()
    keep = native.needs_backward(*inputs)
    y_BLE, last_BKE = native.apply(_Conv, library, keep, return_last_state, reset, *inputs)
    return (y_BLE, last_BKE) if return_last_state else y_BLE


class ConvInputs(NamedTuple):
    """u float32 or bfloat16 with adjacent lanes, the rest contiguous float32."""

    u: Tensor
    weight: Tensor
    bias: Tensor | None
    initial: Tensor | None


class _Conv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Library, keep: bool, want_last: bool, reset: Tensor | None, *inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        if keep:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(reset, *inputs)
            ctx.library = library
        return conv_forward(library, reset, ConvInputs(*inputs), want_last=want_last)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, *saved = ctx.saved_tensors
        inputs = ConvInputs(*saved)
        dy = torch.zeros_like(inputs.u) if dy is None else native.rows(dy)
        dlast = None if dlast is None else dlast.contiguous()
        du = torch.empty(inputs.u.shape, dtype=inputs.u.dtype)
        grads = (du, *conv_backward(ctx.library, reset, inputs, dy, dlast, du))
        return *(None,) * 4, *(g if need else None for g, need in zip(grads, ctx.needs_input_grad[4:], strict=True))


def conv_forward(
    library: Library, reset: Tensor | None, inputs: ConvInputs, *, want_last: bool
) -> tuple[Tensor, Tensor | None]:
    """y, and the last state if wanted."""
    u, weight, bias, initial = inputs
    n_batch, length, width = u.shape
    taps = weight.shape[-1]
    y = torch.empty(u.shape, dtype=u.dtype)
    last = native.floats(n_batch, taps - 1, width) if want_last else None
    library.conv_forward(
        B=n_batch, L=length, E=width, K=taps, is_bf16=u.dtype == torch.bfloat16,
        u=u, y=y, reset=reset, weight=weight, bias=bias, initial=initial, last=last,
    )  # fmt: skip
    return y, last


def conv_backward(
    library: Library, reset: Tensor | None, inputs: ConvInputs, dy: Tensor, dlast: Tensor | None, du: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Writes du, with any strides of its rows; returns the gradients of weight, bias and initial."""
    u, weight, bias, initial = inputs
    n_batch, length, width = u.shape
    dweight = torch.empty_like(weight)
    dbias, dinitial = (None if x is None else torch.empty_like(x) for x in (bias, initial))
    library.conv_backward(
        B=n_batch, L=length, E=width, K=weight.shape[-1], is_bf16=u.dtype == torch.bfloat16,
        u=u, reset=reset, weight=weight, bias=bias, initial=initial,
        dy=dy, du=du, dlast=dlast, dweight=dweight, dbias=dbias, dinitial=dinitial,
    )  # fmt: skip
    return dweight, dbias, dinitial
