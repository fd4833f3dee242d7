"""The autograd node of `mamba_block`: its forward pass, and its backward pass written by hand.

No tensor is copied at a seam: u and z stay halves of in_proj's output, dt, B and C slices of x_proj's, and the kernels
write the gradients into the same places of one buffer.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomamba.kernels import whole_block
from protomamba.kernels.conv import ConvInputs, conv_backward, conv_forward
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.matmul import grad_input, grad_weight, linear
from protomamba.kernels.native import Library
from protomamba.kernels.norm import norm_backward, norm_forward
from protomamba.kernels.reference import BlockWeights
from protomamba.kernels.scan import ScanGradients, ScanInputs, scan_backward, scan_forward
from protomamba.kernels.whole_block import Given


class Remake(IntEnum):
    """What a backward pass makes again instead of keeping it."""

    NOTHING = 0
    CHEAP = 1  # the norm, the convolution's output, dt
    ALL = 2


class BlockCall(NamedTuple):
    """What a block is called with besides tensors."""

    library: Library
    keep: bool
    eps: float
    dtype: torch.dtype
    want_state: bool
    want_u: bool
    remake: Remake
    narrow: bool  # what is kept with a batch and a length is kept in bfloat16
    whole: bool  # in one native call


class _Needs(NamedTuple):
    """Which inputs want a gradient, in the order of `_Block.forward`."""

    x: bool
    norm: bool
    in_proj: bool
    conv_weight: bool
    conv_bias: bool
    x_proj: bool
    dt_proj: bool
    dt_bias: bool
    A_log: bool
    D: bool
    out_proj: bool
    conv_state: bool
    ssm_state: bool


class _Matrices(NamedTuple):
    """The weights of the products, in the dtype of the products."""

    in_proj: Tensor | None
    x_proj: Tensor
    dt_proj: Tensor
    out_proj: Tensor


class _Kept(NamedTuple):
    """What a forward pass made on its way; None for what is not kept. T tokens, or (B, L) of them."""

    normed_TD: Tensor | None
    scale_T: Tensor | None
    uz: Tensor | None
    u: Tensor | None
    projected: Tensor | None
    delta: Tensor | None
    A: Tensor | None
    chunks: Tensor | None


def _before_scan(
    call: BlockCall, given: Given, m: _Matrices, kept: _Kept, want_last: bool
) -> tuple[_Kept, Tensor | None]:
    """Norm, in_proj, convolution, x_proj and dt_proj, as far as they are not there yet; and the convolution's state."""
    normed, scale, uz, u, projected, delta, *rest = kept
    if normed is None:
        normed, _, scale = norm_forward(call.library, _tokens(given.x), given.w.norm_D, call.eps, call.dtype)
    if uz is None:
        assert normed is not None
        uz = (normed if m.in_proj is None else linear(normed, m.in_proj)).view(*given.x.shape[:2], -1)
    u_in, _ = _halves(uz, m.in_proj is not None)
    conv = ConvInputs(u_in, given.w.conv_weight_E1K, given.w.conv_bias_E, given.conv_state)
    last = None
    if u is None:
        u, last = conv_forward(call.library, given.reset, conv, want_last=want_last)
    if projected is None:
        projected = linear(_tokens(u), m.x_proj).view(*given.x.shape[:2], -1)
    if delta is None:
        delta = linear(_tokens(_slices(projected, given.w)[0]), m.dt_proj).view(u.shape)
    return _Kept(normed, scale, uz, u, projected, delta, *rest), last


def _scan_inputs(given: Given, kept: _Kept) -> ScanInputs:
    assert kept.uz is not None and kept.u is not None and kept.projected is not None and kept.delta is not None
    _, B, C = _slices(kept.projected, given.w)
    _, z = _halves(kept.uz, given.w.in_proj_WD is not None)
    A = -torch.exp(given.w.A_log_EN) if kept.A is None else kept.A
    return ScanInputs(kept.u, kept.delta, B, C, z, A, given.w.D_E, given.w.dt_bias_E, given.ssm_state)


_NOTHING = _Kept(*(None,) * 8)


class BlockNode(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: BlockCall, reset: Tensor | None, x: Tensor, *tensors: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        w = BlockWeights(*tensors[:10])
        given = Given(reset, x, w, *tensors[10:])
        ctx.call = call
        ctx.set_materialize_grads(False)
        if call.whole:
            found = whole_block.forward(call.library, given, call.eps, call.keep, call.want_state)
            if call.keep:
                ctx.save_for_backward(reset, x, *tensors, found.A_EN, *found.kept)
            return BlockNode._results(ctx, call, *found[:3], found.kept.u)
        matrices = _matrices(w, call.dtype)
        kept, conv_last = _before_scan(call, given, matrices, _NOTHING, call.want_state)
        scan, u = _scan_inputs(given, kept), kept.u
        keep_chunks = call.keep and call.remake < Remake.ALL
        y, ssm_last, chunks = scan_forward(call.library, True, reset, scan, keep=keep_chunks, want_last=call.want_state)
        out = linear(_tokens(y), matrices.out_proj, _tokens(x)).view(x.shape)
        if call.keep:
            kept = _trimmed(kept._replace(A=scan.A, chunks=chunks), call.remake, w.in_proj_WD is not None)
            if call.narrow:
                x, kept = x.bfloat16(), _activations_in(torch.bfloat16, kept)
            ctx.save_for_backward(reset, x, *tensors, *matrices, *kept)
        return BlockNode._results(ctx, call, out, conv_last, ssm_last, u)

    @staticmethod
    def _results(
        ctx: Any, call: BlockCall, out: Tensor, conv_last: Tensor | None, ssm_last: Tensor | None, u: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        if not call.want_u:
            return out, conv_last, ssm_last, None
        ctx.mark_non_differentiable(u)
        return out, conv_last, ssm_last, u

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dconv_last: Tensor | None, dssm_last: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: BlockCall = ctx.call
        needs = _Needs(*ctx.needs_input_grad[2:])
        reset, x, *saved = ctx.saved_tensors
        given = Given(reset, x.float(), BlockWeights(*saved[:10]), *saved[10:12])
        last = [None if g is None else g.contiguous() for g in (dconv_last, dssm_last)]
        dout = torch.zeros_like(given.x) if dout is None else dout.contiguous()
        if call.whole:
            A_EN, *held = saved[12:]
            parts = whole_block.Kept(*held)
            return None, None, *whole_block.backward(call.library, given, A_EN, parts, dout, last, needs)
        m, kept = _Matrices(*saved[12:16]), _activations_in(call.dtype, _Kept(*saved[16:]))
        dx, d_tensors = _block_backward(call, given, m, kept, dout, last, needs)
        return None, None, dx, *(None if g is None else g.float() for g in d_tensors)


def _matrices(w: BlockWeights, dtype: torch.dtype) -> _Matrices:
    in_proj = None if w.in_proj_WD is None else w.in_proj_WD.to(dtype)
    return _Matrices(in_proj, w.x_proj_SE.to(dtype), w.dt_proj_ER.to(dtype), w.out_proj_DE.to(dtype))


def _trimmed(kept: _Kept, remake: Remake, gated: bool) -> _Kept:
    """Without what the backward pass makes again. Of a block without in_proj uz is the norm, and is kept as that."""
    if remake == Remake.ALL:
        return _NOTHING
    if remake == Remake.CHEAP:
        kept = kept._replace(normed_TD=None, scale_T=None, u=None, delta=None)
    return kept if gated else kept._replace(uz=None)


def _activations_in(dtype: torch.dtype, kept: _Kept) -> _Kept:
    """With all in `dtype` that grows with batch and length, but for the states, where the scan starts again from."""
    wide = kept.normed_TD, kept.uz, kept.u, kept.projected, kept.delta
    normed, uz, u, projected, delta = (None if x is None else x.to(dtype) for x in wide)
    return kept._replace(normed_TD=normed, uz=uz, u=u, projected=projected, delta=delta)


def _block_backward(
    call: BlockCall,
    given: Given,
    m: _Matrices,
    kept: _Kept,
    dout: Tensor,
    last: Sequence[Tensor | None],
    needs: _Needs,
) -> tuple[Tensor | None, tuple[Tensor | None, ...]]:
    """The gradients of x and, in the order of BlockWeights and BlockState, of all else."""
    w, gated = given.w, m.in_proj is not None
    kept, _ = _before_scan(call, given, m, kept, want_last=False)
    scan = _scan_inputs(given, kept)
    uz, u, projected, chunks = kept.uz, kept.u, kept.projected, kept.chunks
    assert uz is not None and u is not None and projected is not None and kept.normed_TD is not None
    if chunks is None:
        _, _, chunks = scan_forward(call.library, True, given.reset, scan, keep=True, want_last=False)
    assert chunks is not None

    dout_cast = _tokens(dout).to(call.dtype)
    dy = grad_input(dout_cast, m.out_proj).view(u.shape)
    duz, dprojected = torch.empty_like(uz), torch.empty_like(projected)
    du_in, dz = _halves(duz, gated)
    dt, _, _ = _slices(projected, w)
    ddt, dB, dC = _slices(dprojected, w)
    grads = ScanGradients(torch.empty_like(u), torch.empty_like(u), dB, dC, dz)
    # The scan's output is never kept: the way back passes through it anyway.
    y = torch.empty_like(u) if needs.out_proj else None
    dA, dD, d_dt_bias, dssm_state = scan_backward(call.library, True, given.reset, scan, chunks, dy, last[1], grads, y)
    d_out_proj = None if y is None else grad_weight(dout_cast, _tokens(y))
    d_dt_proj = grad_weight(_tokens(grads.delta), _tokens(dt)) if needs.dt_proj else None
    ddt.copy_(grad_input(_tokens(grads.delta), m.dt_proj).view(ddt.shape))
    d_x_proj = grad_weight(_tokens(dprojected), _tokens(u)) if needs.x_proj else None
    du = grad_input(_tokens(dprojected), m.x_proj, _tokens(grads.u)).view(u.shape)

    conv = ConvInputs(_halves(uz, gated)[0], w.conv_weight_E1K, w.conv_bias_E, given.conv_state)
    dconv_weight, dconv_bias, dconv_state = conv_backward(call.library, given.reset, conv, du, last[0], du_in)
    d_in_proj = grad_weight(_tokens(duz), kept.normed_TD) if needs.in_proj else None
    dx = dnorm = None
    if needs.x or needs.norm:
        assert kept.scale_T is not None
        dnormed = _tokens(duz) if m.in_proj is None else grad_input(_tokens(duz), m.in_proj)
        dx, dnorm = norm_backward(
            call.library, _tokens(given.x), w.norm_D, kept.scale_T, dnormed, _tokens(dout), needs.norm
        )
        dx = dx.view(given.x.shape)
    return dx, (
        dnorm, d_in_proj, dconv_weight, dconv_bias, d_x_proj, d_dt_proj, d_dt_bias, dA * scan.A, dD, d_out_proj,
        dconv_state, dssm_state,
    )  # fmt: skip


def _tokens(x: Tensor) -> Tensor:
    """(B, L, D) as (T, D): a view, whatever the stride of the rows. (`flatten` takes four times as long.)"""
    return x.view(x.shape[0] * x.shape[1], x.shape[2])


def _halves(uz: Tensor, gated: bool) -> tuple[Tensor, Tensor | None]:
    """The views u and z of (B, L, 2 E), or all of it as u without a gate."""
    if not gated:
        return uz, None
    inner = uz.shape[-1] // 2
    return uz[..., :inner], uz[..., inner:]


def _slices(projected: Tensor, w: BlockWeights) -> tuple[Tensor, Tensor, Tensor]:
    """The views dt, B and C of (B, L, R + 2 N)."""
    rank, n_state = w.dt_proj_ER.shape[1], w.A_log_EN.shape[1]
    return projected[..., :rank], projected[..., rank : rank + n_state], projected[..., rank + n_state :]
