"""The block and what it is made of: scan, convolution, norm."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protomamba.kernels.reference.numbers import compute_dtype, matmul_dtype


class BlockState(NamedTuple):
    """What a block carries from one token to the next.

    conv_BKE: (B, K - 1, E), the last inputs of the convolution, oldest first. ssm_BEN: (B, E, N), the scan's state.
    """

    conv_BKE: Tensor
    ssm_BEN: Tensor


class BlockWeights(NamedTuple):
    """The parameters of one residual Mamba block, shapes as published (W = 2 E, S = R + 2 N).

    Without in_proj (None) it is the compact block: E = D, no gate, the convolution acts on the normed input.
    """

    norm_D: Tensor
    in_proj_WD: Tensor | None
    conv_weight_E1K: Tensor
    conv_bias_E: Tensor
    x_proj_SE: Tensor
    dt_proj_ER: Tensor
    dt_bias_E: Tensor
    A_log_EN: Tensor
    D_E: Tensor
    out_proj_DE: Tensor


class BlockOutput(NamedTuple):
    """x_BLD with the block's residual added; the state after the last position, if asked for; the activation that `D`
    multiplies (B, L, E), detached, if asked for."""

    x_BLD: Tensor
    state: BlockState | None
    u_BLE: Tensor | None


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
    """Selective scan (Gu & Dao 2023, arXiv 2312.00752, equation 2 with the discretisation of algorithm 2).

        dt_t = delta_t + delta_bias                        softplus of it with `delta_softplus`
        h_t  = exp(dt_t A) h_{t-1} + dt_t u_t B_t          elementwise in (E, N); h_{-1} = initial_state or 0
        y_t  = sum_n C_t h_t + skip u_t                    times SiLU(z_t) if z is given

    A is A itself (negative), not A_log. Where `reset_BL` (bool) is true, h_{t-1} counts as 0, so a document never sees
    the one before it. Returns y (B, L, E) in u's dtype; with `return_last_state` also h_{L-1} (B, E, N). Differentiable
    in every tensor, the states included. L >= 1.
    """
    dtype = compute_dtype(u_BLE)
    u, delta = u_BLE.to(dtype), delta_BLE.to(dtype)
    A, B, C = A_EN.to(dtype), B_BLN.to(dtype), C_BLN.to(dtype)
    if delta_bias_E is not None:
        delta = delta + delta_bias_E.to(dtype)
    if delta_softplus:
        delta = F.softplus(delta)
    if initial_state_BEN is None:
        h_BEN = u.new_zeros(u.shape[0], *A.shape)
    else:
        h_BEN = initial_state_BEN.to(dtype)
    y = []
    for t in range(u.shape[1]):
        if reset_BL is not None:
            h_BEN = h_BEN.masked_fill(reset_BL[:, t, None, None], 0.0)
        dt_BE1 = delta[:, t, :, None]
        h_BEN = torch.exp(dt_BE1 * A) * h_BEN + dt_BE1 * u[:, t, :, None] * B[:, t, None, :]
        y.append((h_BEN * C[:, t, None, :]).sum(-1))
    y_BLE = torch.stack(y, dim=1)
    if skip_E is not None:
        y_BLE = y_BLE + skip_E.to(dtype) * u
    if z_BLE is not None:
        y_BLE = y_BLE * F.silu(z_BLE.to(dtype))
    y_BLE = y_BLE.to(u_BLE.dtype)
    return (y_BLE, h_BEN) if return_last_state else y_BLE


def causal_conv(
    u_BLE: Tensor,
    weight_E1K: Tensor,
    bias_E: Tensor | None = None,
    initial_state_BKE: Tensor | None = None,
    return_last_state: bool = False,
    reset_BL: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Depthwise causal convolution followed by SiLU.

        y_t = SiLU(bias + sum_k weight[:, 0, k] u_{t - (K - 1) + k})

    u before the first position is `initial_state` (B, K - 1, E), oldest first, or 0. Where `reset_BL` is true, every
    earlier input counts as 0 from there on. With `return_last_state` also the last K - 1 inputs as the next call's
    initial state (inputs from before the last reset are 0 in it). Returns y in u's dtype.
    """
    dtype = compute_dtype(u_BLE)
    n_batch, length, width = u_BLE.shape
    taps = weight_E1K.shape[-1]
    u, weight = u_BLE.to(dtype), weight_E1K.to(dtype)
    if initial_state_BKE is None:
        history = u.new_zeros(n_batch, taps - 1, width)
    else:
        history = initial_state_BKE.to(dtype)
    padded = torch.cat([history, u], dim=1)
    # The number of resets up to a position names its document; the history belongs to document 0.
    document_BL = torch.zeros(n_batch, taps - 1 + length, dtype=torch.long)
    if reset_BL is not None:
        document_BL[:, taps - 1 :] = reset_BL.long().cumsum(1)
    pre = torch.zeros_like(u) if bias_E is None else bias_E.to(dtype).expand_as(u)
    for k in range(taps):
        seen_BL = document_BL[:, k : k + length] == document_BL[:, taps - 1 :]
        pre = pre + weight[:, 0, k] * padded[:, k : k + length].masked_fill(~seen_BL[..., None], 0.0)
    y_BLE = F.silu(pre).to(u_BLE.dtype)
    if not return_last_state:
        return y_BLE
    stale_BK = document_BL[:, length:] != document_BL[:, -1:]
    return y_BLE, padded[:, length:].masked_fill(stale_BK[..., None], 0.0)


def rms_norm(x_BLD: Tensor, weight_D: Tensor, eps: float = 1e-5) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension (Zhang & Sennrich 2019, arXiv 1910.07467)."""
    dtype = compute_dtype(x_BLD)
    x = x_BLD.to(dtype)
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight_D.to(dtype)).to(x_BLD.dtype)


def add_rms_norm(x_BLD: Tensor, residual_BLD: Tensor, weight_D: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): the seam between two blocks of a residual stack."""
    total_BLD = x_BLD + residual_BLD
    return rms_norm(total_BLD, weight_D, eps), total_BLD


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
    """A whole residual Mamba block: x + out_proj(scan(conv(in_proj(rms_norm(x))))) (arXiv 2312.00752, figure 3).

        [u | z] = in_proj norm(x)     (or u = norm(x) and no z: the compact block)
        u = causal_conv(u)            [dt | B | C] = x_proj u
        y = selective_scan(u, dt_proj dt, -exp(A_log), B, C, D, z, dt_bias, softplus)

    precision "bf16": the matrix products and the activations between them are bfloat16; the residual stream, the norm,
    A, D, dt_bias and the scan's state stay float32. Starts from `state` if given. Where `reset_BL` is true, both the
    scan's state and the convolution's history are dropped before that position. Differentiable in every tensor.
    """
    w = weights
    dtype = matmul_dtype(precision, x_BLD)
    rank, n_state = w.dt_proj_ER.shape[1], w.A_log_EN.shape[1]
    u_BLE, z_BLE = rms_norm(x_BLD, w.norm_D, eps).to(dtype), None
    if w.in_proj_WD is not None:
        u_BLE, z_BLE = F.linear(u_BLE, w.in_proj_WD.to(dtype)).chunk(2, dim=-1)
    conv_state, ssm_state = state if state is not None else (None, None)
    u_BLE, conv_state = causal_conv(u_BLE, w.conv_weight_E1K, w.conv_bias_E, conv_state, True, reset_BL)
    projected_BLS = F.linear(u_BLE, w.x_proj_SE.to(dtype))
    dt_BLR, B_BLN, C_BLN = torch.split(projected_BLS, [rank, n_state, n_state], dim=-1)
    delta_BLE = F.linear(dt_BLR, w.dt_proj_ER.to(dtype))
    A_EN = -torch.exp(w.A_log_EN)
    y_BLE, ssm_state = selective_scan(
        u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, w.D_E, z_BLE, w.dt_bias_E, True, ssm_state, True, reset_BL
    )
    out_BLD = x_BLD + F.linear(y_BLE, w.out_proj_DE.to(dtype)).to(x_BLD.dtype)
    new_state = BlockState(conv_state, ssm_state) if return_state else None
    return BlockOutput(out_BLD, new_state, u_BLE.detach() if want_u else None)
