"""selective_scan: shape checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.native import Library, mask_view, pointer, view


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
    narrow = [None if x is None else native.rows(x.to(u_BLE.dtype)) for x in (u_BLE, delta_BLE, B_BLN, C_BLN, z_BLE)]
    wide = [None if x is None else x.float().contiguous() for x in (A_EN, skip_E, delta_bias_E, initial_state_BEN)]
    reset = None if reset_BL is None else reset_BL.bool().contiguous()
    keep = native.needs_backward(*narrow, *wide)
    y_BLE, last_BEN = _Scan.apply(library, keep, delta_softplus, return_last_state, reset, *narrow, *wide)
    return (y_BLE, last_BEN) if return_last_state else y_BLE


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, library: Library, keep: bool, softplus: bool, want_last: bool, reset: Tensor | None, *tensors: Any
    ) -> tuple[Tensor, Tensor | None]:
        y, last, chunks = scan_forward(library, softplus, reset, *tensors, keep=keep, want_last=want_last)
        if keep:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(reset, chunks, *tensors)
            ctx.library, ctx.softplus = library, softplus
        return y, last

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, dy: Tensor | None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
        reset, chunks, *tensors = ctx.saved_tensors
        dy = torch.zeros_like(tensors[0]) if dy is None else native.rows(dy)
        dlast = None if dlast is None else dlast.contiguous()
        narrow = [
            None if x is None else torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors[:5]
        ]
        du, ddelta, dB, dC, dz = narrow
        assert du is not None and ddelta is not None and dB is not None and dC is not None
        wide = scan_backward(
            ctx.library, ctx.softplus, reset, chunks, *tensors, dy, dlast, du=du, ddelta=ddelta, dB=dB, dC=dC, dz=dz
        )
        grads = (None, None, None, None, None, *narrow, *wide)
        return tuple(g if needed else None for g, needed in zip(grads, ctx.needs_input_grad, strict=True))


def scan_forward(
    library: Library,
    softplus: bool,
    reset: Tensor | None,
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    skip: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    *,
    keep: bool,
    want_last: bool,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """y, the last state if wanted, what the backward pass needs if `keep`. Lanes adjacent, A and states contiguous."""
    n_batch, length, width = u.shape
    n_state = A.shape[1]
    y = torch.empty(u.shape, dtype=u.dtype)
    last = torch.empty(n_batch, width, n_state) if want_last else None
    chunks = torch.empty(library.scan_chunk_floats(n_batch, length, width, n_state)) if keep else None
    library.call(
        "scan_forward",
        n_batch, length, width, n_state, u.dtype == torch.bfloat16, softplus,
        *view(u), *view(delta), *view(B), *view(C), *view(z), *view(y), *mask_view(reset),
        pointer(A), pointer(skip), pointer(bias), pointer(initial), pointer(last), pointer(chunks),
        *(0,) * 23,
    )  # fmt: skip
    return y, last, chunks


def scan_backward(
    library: Library,
    softplus: bool,
    reset: Tensor | None,
    chunks: Tensor,
    u: Tensor,
    delta: Tensor,
    B: Tensor,
    C: Tensor,
    z: Tensor | None,
    A: Tensor,
    skip: Tensor | None,
    bias: Tensor | None,
    initial: Tensor | None,
    dy: Tensor,
    dlast: Tensor | None,
    *,
    du: Tensor,
    ddelta: Tensor,
    dB: Tensor,
    dC: Tensor,
    dz: Tensor | None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Writes du, ddelta, dB, dC and dz, with any strides of their rows; returns those of A, skip, bias, initial."""
    n_batch, length, width = u.shape
    dA, dskip, dbias, dinitial = (None if x is None else torch.empty_like(x) for x in (A, skip, bias, initial))
    library.call(
        "scan_backward",
        n_batch, length, width, A.shape[1], u.dtype == torch.bfloat16, softplus,
        *view(u), *view(delta), *view(B), *view(C), *view(z), 0, 0, 0, *mask_view(reset),
        pointer(A), pointer(skip), pointer(bias), pointer(initial), 0, pointer(chunks),
        *view(dy), *view(du), *view(ddelta), *view(dB), *view(dC), *view(dz),
        pointer(dlast), pointer(dA), pointer(dskip), pointer(dbias), pointer(dinitial),
    )  # fmt: skip
    assert dA is not None
    return dA, dskip, dbias, dinitial
