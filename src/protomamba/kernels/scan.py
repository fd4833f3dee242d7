"""selective_scan: shape checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.native import Library


def selective_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    skip_E: Tensor | None = None,
    z_BLE: Tensor | None = None,
    delta_bias_E: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state_BEN: Tensor | None = None,
    return_last_state: bool = False,
    reset_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective scan of arXiv 2312.00752: see `reference.selective_scan`, which this equals.

    Native for float32 and bfloat16 (the arithmetic is float32; A, skip, delta_bias and the states stay float32),
    whatever the strides of the first two dimensions. ValueError for shapes that do not fit.
    """
    check_shapes(
        "selective_scan",
        u_BLE=u_BLE, delta_BLE=delta_BLE, A_EN=A_EN, B_BLN=B_BLN, C_BLN=C_BLN, skip_E=skip_E, z_BLE=z_BLE,
        delta_bias_E=delta_bias_E, initial_state_BEN=initial_state_BEN, reset_BL=reset_BL,
    )  # fmt: skip
    library = native.select("selective_scan", u_BLE)
    if library is None:
        return reference.selective_scan(
            u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, skip_E, z_BLE, delta_bias_E, delta_softplus, initial_state_BEN,
            return_last_state, reset_BL,
        )  # fmt: skip
    # Inputs wider than u stay so: with u alone in bfloat16, everything is float32 but the result.
    alike = all(x is None or x.dtype == u_BLE.dtype for x in (delta_BLE, B_BLN, C_BLN, z_BLE))
    dtype = u_BLE.dtype if alike else torch.float32
    u, delta, B, C = (native.rows(x.to(dtype)) for x in (u_BLE, delta_BLE, B_BLN, C_BLN))
    z = None if z_BLE is None else native.rows(z_BLE.to(dtype))
    skip, bias, initial = (
        None if x is None else x.float().contiguous() for x in (skip_E, delta_bias_E, initial_state_BEN)
    )
    inputs = ScanInputs(u, delta, B, C, z, A_EN.float().contiguous(), skip, bias, initial)
    reset = None if reset_BL is None else reset_BL.bool().contiguous()
    keep = native.needs_backward(*inputs)
    y_BLE, last_BEN = native.apply(_Scan, library, keep, delta_softplus, return_last_state, reset, *inputs)
    y_BLE = y_BLE.to(u_BLE.dtype)
    return (y_BLE, last_BEN) if return_last_state else y_BLE


class ScanInputs(NamedTuple):
    """Float32 or bfloat16 with adjacent lanes up to z, contiguous float32 after it."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None
    A: Tensor
    skip: Tensor | None
    bias: Tensor | None
    initial: Tensor | None


class ScanGradients(NamedTuple):
    """Where the backward pass writes: shaped as the inputs of the same name, any strides of the rows."""

    u: Tensor
    delta: Tensor
    B: Tensor
    C: Tensor
    z: Tensor | None


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Library, keep: bool, softplus: bool, want_last: bool, reset: Tensor | None, *inputs: Any
    ) -> tuple[Tensor, Tensor | None]:
        y, last, chunks = scan_forward(library, softplus, reset, ScanInputs(*inputs), keep=keep, want_last=want_last)
        if keep:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(reset, chunks, *inputs)
            ctx.library, ctx.softplus = library, softplus
        return y, last

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, chunks, *saved = ctx.saved_tensors
        inputs = ScanInputs(*saved)
        dy = torch.zeros_like(inputs.u) if dy is None else native.rows(dy)
        dlast = None if dlast is None else dlast.contiguous()
        u, delta, B, C = (torch.empty(x.shape, dtype=x.dtype) for x in inputs[:4])
        grads = ScanGradients(u, delta, B, C, None if inputs.z is None else torch.empty_like(u))
        wide = scan_backward(ctx.library, ctx.softplus, reset, inputs, chunks, dy, dlast, grads)
        needed = ctx.needs_input_grad[5:]
        return *(None,) * 5, *(g if need else None for g, need in zip((*grads, *wide), needed, strict=True))


def scan_forward(
    library: Library, softplus: bool, reset: Tensor | None, inputs: ScanInputs, *, keep: bool, want_last: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, the last state if wanted, and the states at the chunks' starts for the backward pass if `keep`."""
    u, delta, B, C, z, A, skip, bias, initial = inputs
    n_batch, length, width = u.shape
    n_state = A.shape[1]
    y = torch.empty(u.shape, dtype=u.dtype)
    last = native.floats(n_batch, width, n_state) if want_last else None
    chunks = native.floats(library.scan_chunk_floats(n_batch, length, width, n_state)) if keep else None
    library.scan_forward(
        B=n_batch, L=length, E=width, N=n_state, is_bf16=u.dtype == torch.bfloat16, softplus=softplus,
        u=u, delta=delta, Bm=B, Cm=C, z=z, y=y, reset=reset,
        A=A, skip=skip, bias=bias, initial=initial, last=last, chunks=chunks,
    )  # fmt: skip
    return y, last, chunks


def scan_backward(
    library: Library,
    softplus: bool,
    reset: Tensor | None,
    inputs: ScanInputs,
    chunks: Tensor,
    dy: Tensor,
    dlast: Tensor | None,
    grads: ScanGradients,
    y: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Writes `grads`, and into `y` what the forward pass gave; returns the gradients of A, skip, bias and initial."""
    u, delta, B, C, z, A, skip, bias, initial = inputs
    n_batch, length, width = u.shape
    dA = torch.empty_like(A)
    dskip, dbias, dinitial = (None if x is None else torch.empty_like(x) for x in (skip, bias, initial))
    library.scan_backward(
        B=n_batch, L=length, E=width, N=A.shape[1], is_bf16=u.dtype == torch.bfloat16, softplus=softplus,
        u=u, delta=delta, Bm=B, Cm=C, z=z, y=y, reset=reset,
        A=A, skip=skip, bias=bias, initial=initial, chunks=chunks,
        dy=dy, du=grads.u, ddelta=grads.delta, dBm=grads.B, dCm=grads.C, dz=grads.z,
        dlast=dlast, dA=dA, dskip=dskip, dbias=dbias, dinitial=dinitial,
    )  # fmt: skip
    return dA, dskip, dbias, dinitial
