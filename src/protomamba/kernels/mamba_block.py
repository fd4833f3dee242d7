"""mamba_block: a whole residual Mamba (or compact) block as one autograd node, with its backward pass written by hand.

The definition is `reference.mamba_block`. No tensor is copied at a seam: u and z stay halves of in_proj's output, dt, B
and C slices of x_proj's, and the kernels write the gradients into the same places of one buffer.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.conv import ConvInputs, conv_backward, conv_forward
from protomamba.kernels.matmul import grad_input, grad_weight, linear
from protomamba.kernels.native import Library
from protomamba.kernels.norm import norm_backward, norm_forward
from protomamba.kernels.reference import BlockOutput, BlockState, BlockWeights, matmul_dtype
from protomamba.kernels.scan import ScanGradients, ScanInputs, scan_backward, scan_forward


def mamba_block(
    x_BLD: Tensor,
    weights: BlockWeights,
    *,
    eps: float = 1e-5,
    precision: str = "fp32",
    state: BlockState | None = None,
    return_state: bool = False,
    reset_BL: Tensor | None = None,
    want_u: bool = False,
) -> BlockOutput:
    """x + out_proj(scan(conv(in_proj(rms_norm(x))))): see `reference.mamba_block`, which this equals.

    Native for float32 x. Frozen weights cost no gradient product, and without gradients nothing is kept. ValueError for
    shapes that do not fit and for a precision other than "fp32" and "bf16".
    """
    check_block_shapes("mamba_block", weights, state, x_BLD=x_BLD, reset_BL=reset_BL)
    dtype = matmul_dtype(precision, x_BLD)
    library = native.select("mamba_block", x_BLD, (torch.float32,))
    if library is None:
        return reference.mamba_block(
            x_BLD, weights, eps=eps, precision=precision, state=state, return_state=return_state, reset_BL=reset_BL,
            want_u=want_u,
        )  # fmt: skip
    tensors = [None if w is None else w.float().contiguous() for w in (*weights, *(state or (None, None)))]
    reset = None if reset_BL is None else reset_BL.bool().contiguous()
    call = _Call(library, native.needs_backward(x_BLD, *tensors), eps, dtype, return_state, want_u)
    out_BLD, conv_BKE, ssm_BEN, u_BLE = native.apply(_Block, call, reset, x_BLD.contiguous(), *tensors)
    return BlockOutput(out_BLD, BlockState(conv_BKE, ssm_BEN) if return_state else None, u_BLE)


def check_block_shapes(op: str, w: BlockWeights, state: BlockState | None, **x: Tensor | None) -> dict[str, int]:
    """Checks the weights, the state and `x` against each other; returns the sizes."""
    sizes = check_shapes(
        op, sizes=None, **x,
        norm_D=w.norm_D, conv_weight_E1K=w.conv_weight_E1K, conv_bias_E=w.conv_bias_E, A_log_EN=w.A_log_EN,
        dt_proj_ER=w.dt_proj_ER, dt_bias_E=w.dt_bias_E, D_E=w.D_E, out_proj_DE=w.out_proj_DE,
    )  # fmt: skip
    sizes |= {"W": 2 * sizes["E"], "S": sizes["R"] + 2 * sizes["N"], "H": sizes["K"] - 1}
    check_shapes(op, sizes=sizes, in_proj_WD=w.in_proj_WD, x_proj_SE=w.x_proj_SE)
    if w.in_proj_WD is None and sizes["E"] != sizes["D"]:
        raise ValueError(f"{op}: without in_proj expected E = D, got E={sizes['E']} D={sizes['D']}")
    if state is not None:
        sizes = check_shapes(op, sizes=sizes, state_ssm_BEN=state.ssm_BEN)
        if sizes["H"] > 0:
            check_shapes(op, sizes=sizes, state_conv_BHE=state.conv_BKE)
    return sizes


class _Call(NamedTuple):
    """What a block is called with besides tensors."""

    library: Library
    keep: bool
    eps: float
    dtype: torch.dtype
    want_state: bool
    want_u: bool


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


class _Block(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, call: _Call, reset: Tensor | None, x: Tensor, *tensors: Any
    ) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        w, (conv_state, ssm_state) = BlockWeights(*tensors[:10]), tensors[10:]
        in_proj = None if w.in_proj_WD is None else w.in_proj_WD.to(call.dtype)
        x_proj, dt_proj, out_proj = (m.to(call.dtype) for m in (w.x_proj_SE, w.dt_proj_ER, w.out_proj_DE))
        gated = in_proj is not None

        normed_TD, _, scale_T = norm_forward(call.library, _tokens(x), w.norm_D, call.eps, call.dtype)
        uz = (normed_TD if in_proj is None else linear(normed_TD, in_proj)).view(*x.shape[:2], -1)
        u_in, z = _halves(uz, gated)
        conv = ConvInputs(u_in, w.conv_weight_E1K, w.conv_bias_E, conv_state)
        u, conv_last = conv_forward(call.library, reset, conv, want_last=call.want_state)
        projected = linear(_tokens(u), x_proj).view(*x.shape[:2], -1)
        dt, B, C = _slices(projected, w)
        delta = linear(_tokens(dt), dt_proj).view(u.shape)
        scan = ScanInputs(u, delta, B, C, z, -torch.exp(w.A_log_EN), w.D_E, w.dt_bias_E, ssm_state)
        y, ssm_last, chunks = scan_forward(call.library, True, reset, scan, keep=call.keep, want_last=call.want_state)
        out = linear(_tokens(y), out_proj, _tokens(x)).view(x.shape)

        if call.keep:
            ctx.call = call
            ctx.set_materialize_grads(False)
            matrices = (in_proj, x_proj, dt_proj, out_proj)
            ctx.save_for_backward(
                reset, x, *tensors, *matrices, normed_TD, scale_T, uz, u, projected, delta, scan.A, y, chunks
            )
        if not call.want_u:
            return out, conv_last, ssm_last, None
        ctx.mark_non_differentiable(u)
        return out, conv_last, ssm_last, u

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, dout: Tensor | None, dconv_last: Tensor | None, dssm_last: Tensor | None, _: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        needs = _Needs(*ctx.needs_input_grad[2:])
        reset, x, *saved = ctx.saved_tensors
        w, (conv_state, ssm_state) = BlockWeights(*saved[:10]), saved[10:12]
        in_proj, x_proj, dt_proj, out_proj, normed_TD, scale_T, uz, u, projected, delta, A, y, chunks = saved[12:]
        gated = in_proj is not None
        dconv_last, dssm_last = (None if g is None else g.contiguous() for g in (dconv_last, dssm_last))

        dout_TD = _tokens(torch.zeros_like(x) if dout is None else dout.contiguous())
        dout_cast = dout_TD.to(call.dtype)
        d_out_proj = grad_weight(dout_cast, _tokens(y)) if needs.out_proj else None
        dy = grad_input(dout_cast, out_proj).view(u.shape)

        duz, dprojected = torch.empty_like(uz), torch.empty_like(projected)
        u_in, z = _halves(uz, gated)
        du_in, dz = _halves(duz, gated)
        dt, B, C = _slices(projected, w)
        ddt, dB, dC = _slices(dprojected, w)
        scan = ScanInputs(u, delta, B, C, z, A, w.D_E, w.dt_bias_E, ssm_state)
        grads = ScanGradients(torch.empty_like(u), torch.empty_like(delta), dB, dC, dz)
        dA, dD, d_dt_bias, dssm_state = scan_backward(call.library, True, reset, scan, chunks, dy, dssm_last, grads)
        d_dt_proj = grad_weight(_tokens(grads.delta), _tokens(dt)) if needs.dt_proj else None
        ddt.copy_(grad_input(_tokens(grads.delta), dt_proj).view(ddt.shape))
        d_x_proj = grad_weight(_tokens(dprojected), _tokens(u)) if needs.x_proj else None
        du = grad_input(_tokens(dprojected), x_proj, _tokens(grads.u)).view(u.shape)

        conv = ConvInputs(u_in, w.conv_weight_E1K, w.conv_bias_E, conv_state)
        dconv_weight, dconv_bias, dconv_state = conv_backward(call.library, reset, conv, du, dconv_last, du_in)
        d_in_proj = grad_weight(_tokens(duz), normed_TD) if needs.in_proj else None
        dx = dnorm = None
        if needs.x or needs.norm:
            dnormed_TD = grad_input(_tokens(duz), in_proj) if gated else _tokens(duz)
            dx, dnorm = norm_backward(call.library, _tokens(x), w.norm_D, scale_T, dnormed_TD, dout_TD, needs.norm)
            dx = dx.view(x.shape)
        # In the order of BlockWeights, then the states.
        d_tensors = (
            dnorm, d_in_proj, dconv_weight, dconv_bias, d_x_proj, d_dt_proj, d_dt_bias, dA * A, dD, d_out_proj,
            dconv_state, dssm_state,
        )  # fmt: skip
        return None, None, dx, *(None if g is None else g.float() for g in d_tensors)


def _tokens(x: Tensor) -> Tensor:
    """(B, L, D) as (T, D): a view, whatever the stride of the rows."""
    return x.flatten(0, 1)


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
