"""The definitions: every kernel in plain PyTorch, sequential, no tricks. The native ones are tested against these.

Legend: B batch, L length, T = B * L tokens, D model width, E inner width, N state, R dt rank, K taps, V classes.

Any floating dtype: float64 is computed in float64, everything narrower in float32. Results have the dtype of the first
argument unless a docstring says otherwise; recurrent states have the dtype of the computation.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


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


class Judging(NamedTuple):
    """What `judge_block` keeps of the blocks so far, for T targets; what is None is not looked for.

    values_TK: the K best scores, falling, NaN first. classes_TK: int64, theirs; of equal scores the lowest comes first.
    log_sum_T: float64, log sum exp(factor score). rank_T: int64, how many classes score at least as high as the target.
    """

    values_TK: Tensor | None = None
    classes_TK: Tensor | None = None
    log_sum_T: Tensor | None = None
    rank_T: Tensor | None = None

    @classmethod
    def empty(cls, targets: int, k: int, dtype: torch.dtype) -> Judging:
        """Room for all four, for scores of `dtype`."""
        values_TK, classes_TK = torch.empty(targets, k, dtype=dtype), torch.empty(targets, k, dtype=torch.int64)
        return cls(
            values_TK,
            classes_TK,
            torch.empty(targets, dtype=torch.float64),
            torch.empty(targets, dtype=torch.int64),
        )


class LogitProjection(NamedTuple):
    """How a head's logits come from z: scale * (z, or z / |z| where `unit`) . every row of matrix_VD."""

    matrix_VD: Tensor
    unit: bool
    scale: float


def compute_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


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


# A vector shorter than this has no direction.
MIN_NORM = 1e-12


def unit(x_TD: Tensor) -> Tensor:
    """x / |x| over the last dimension; 0, without a gradient, where |x| < 1e-12."""
    norm_T1 = torch.linalg.vector_norm(x_TD.detach(), dim=-1, keepdim=True)
    short_T1 = norm_T1 < MIN_NORM
    safe_TD = torch.where(short_T1, torch.ones_like(x_TD), x_TD)
    direction_TD = safe_TD / torch.linalg.vector_norm(safe_TD, dim=-1, keepdim=True)
    return torch.where(short_T1, torch.zeros_like(x_TD), direction_TD)


def prototype_loss(z_TD: Tensor, prototypes_VD: Tensor, targets_T: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Hyperspherical prototype loss (Mettes, van der Pol & Snoek 2019, arXiv 1901.10514, equation 2).

        loss = mean over targets y >= 0 of (1 - cos(z, p_y))^2

    z (T, D), prototypes (V, D) of any length, targets (T,) int64; those below 0 are ignored; 0 without any. The mean is
    weighted by `weight_T` (T,) >= 0 where that is given. A z or p shorter than 1e-12 has cosine 0 and no gradient.
    Touches only the rows of the targets.
    """
    dtype = compute_dtype(z_TD)
    valid_T = targets_T >= 0
    z = unit(z_TD[valid_T].to(dtype))
    # index_select, not indexing: with several threads the gradient of indexing adds up in any order.
    p = unit(prototypes_VD.index_select(0, targets_T[valid_T]).to(dtype))
    return weighted_mean((1.0 - (z * p).sum(-1)).square(), None if weight_T is None else weight_T[valid_T])


def weighted_mean(loss_T: Tensor, weight_T: Tensor | None) -> Tensor:
    """The mean of the losses, weighted where weights are given; 0 without a loss that counts."""
    if weight_T is None:
        return loss_T.sum() / max(len(loss_T), 1)
    total = float(weight_T.double().sum())
    return (loss_T * weight_T.to(loss_T.dtype)).sum() / (total if total > 0 else 1.0)


class Sample(NamedTuple):
    """What a group of tokens is held against: some classes, and how likely each was to be among them.

    classes_S: int64, in rising order. log_chance_RS: for each run of consecutive tokens the log of each class's chance
    to be in the sample, given all that decides their z; tokens_R: how many tokens a run has.
    """

    classes_S: Tensor
    log_chance_RS: Tensor
    tokens_R: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.tokens_R)

    def log_chance_TS(self) -> Tensor:
        """(T, S): each token's."""
        return self.log_chance_RS.repeat_interleave(torch.tensor(self.tokens_R), 0)


def sampled_cross_entropy(
    z_TD: Tensor,
    prototypes_VD: Tensor,
    log_scale: Tensor,
    targets_T: Tensor,
    sample_S: Tensor | None = None,
    log_chance: Tensor | None = None,
    weight_T: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Cross entropy, in nats, over the logits s cos(z, p_k), s = exp(log_scale), from a sample of the wrong classes.

        mean over t of  log(1 + sum_k exp(s cos(z_t, p_k) - s cos(z_t, p_y)) / q_k),   k in the sample without y

    Targets (T,) are all >= 0. sample_S: int64 classes in rising order, all V without it; q_k, given as its log, (S,)
    for all tokens or (T, S), is the chance of class k to be in the sample, given all that decides z_t; 1 without it.
    The sum estimates that over all classes without bias, its logarithm does not (Bengio & Senecal 2008; Jean et al.
    2015, arXiv 1412.2007). Weighted as in `prototype_loss`.
    precision "bf16": the cosines of the sample are a product in bfloat16, and so are its two gradients.
    """
    classes_S = torch.arange(len(prototypes_VD)) if sample_S is None else sample_S
    z = unit(z_TD.to(compute_dtype(z_TD)))
    s = log_scale.to(z.dtype).exp()
    own_T = s * (z * unit(prototypes_VD.index_select(0, targets_T).to(z.dtype))).sum(-1)
    others_TS = s * _product_in(precision, z, unit(prototypes_VD.index_select(0, classes_S).to(z.dtype)))
    return weighted_mean(_against_sample(own_T, others_TS, targets_T, classes_S, log_chance), weight_T)


def _product_in(precision: str, x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x @ w.T of one dtype, computed in that of `precision`."""
    dtype = matmul_dtype(precision, x_TI)
    return (x_TI.to(dtype) @ w_OI.to(dtype).t()).to(x_TI.dtype)


def _against_sample(
    own_T: Tensor, others_TS: Tensor, targets_T: Tensor, classes_S: Tensor, log_chance: Tensor | None
) -> Tensor:
    """(T,): log(1 + sum over the sampled classes k but the own one of exp(others_k - own) / q_k)."""
    if log_chance is not None:
        others_TS = others_TS - log_chance.to(others_TS.dtype)
    others_TS = others_TS.masked_fill(classes_S == targets_T[:, None], -math.inf)
    nobody_TS = torch.full_like(others_TS[:, :1], -1e30)  # so that a sample of the own class alone has a logarithm
    return F.softplus(torch.cat([others_TS, nobody_TS], -1).logsumexp(-1) - own_T)


def separated_prototype_loss(
    z_TD: Tensor,
    prototypes_VD: Tensor,
    log_scale: Tensor,
    targets_T: Tensor,
    sample_S: Tensor | None = None,
    log_chance_S: Tensor | None = None,
    weight_T: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """The value of `prototype_loss`, with the gradient of the `sampled_cross_entropy` of its targets in its place."""
    loss = prototype_loss(z_TD, prototypes_VD, targets_T, weight_T).detach()
    kept = targets_T >= 0
    weight_K = None if weight_T is None else weight_T[kept]
    term = sampled_cross_entropy(
        z_TD[kept], prototypes_VD, log_scale, targets_T[kept], sample_S, log_chance_S, weight_K, precision
    )
    return loss + (term - term.detach())


def grouped_prototype_loss(
    z_TD: Tensor,
    prototypes_VD: Tensor,
    log_scale: Tensor,
    targets_T: Tensor,
    samples: Sequence[Sample],
    weight_T: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """`separated_prototype_loss` with a sample of its own for each group of the tokens that have a target, in their
    order; the mean is that over all tokens."""
    loss = prototype_loss(z_TD, prototypes_VD, targets_T, weight_T).detach()
    kept = targets_T >= 0
    weight_T = torch.ones_like(targets_T, dtype=compute_dtype(z_TD)) if weight_T is None else weight_T
    parts = (torch.split(x[kept], [sample.tokens for sample in samples]) for x in (z_TD, targets_T, weight_T))
    term = loss.new_zeros(())
    for sample, z, targets, weight in zip(samples, *parts, strict=True):
        given = z, prototypes_VD, log_scale, targets, sample.classes_S, sample.log_chance_TS(), weight, precision
        term = term + sampled_cross_entropy(*given) * (weight.sum() / weight_T[kept].sum().clamp_min(1e-30))
    return loss + (term - term.detach())


def softmax_loss(
    z_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weight_T: Tensor | None = None,
    block: int | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Mean over targets y >= 0 of -log softmax(z W^T)_y; 0 without any. Weighted by `weight_T` (T,) >= 0 where given.
    `block` is for the blocked op. precision "bf16": the logits are a product in bfloat16, and so are its gradients."""
    dtype = compute_dtype(z_TD)
    kept = targets_T >= 0
    logits_TV = _product_in(precision, z_TD[kept].to(dtype), weight_VD.to(dtype))
    loss_T = F.cross_entropy(logits_TV, targets_T[kept], reduction="none")
    return weighted_mean(loss_T, None if weight_T is None else weight_T[kept])


def sampled_softmax_loss(
    z_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    sample_S: Tensor,
    log_chance: Tensor,
    weight_T: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """`softmax_loss` estimated from a sample of the wrong classes, as `sampled_cross_entropy` estimates its own:

    mean over targets y >= 0 of  log(1 + sum_k exp(z.w_k - z.w_y) / q_k),   k in the sample without y

    log_chance: log q_k, (S,) for all tokens or (T, S).
    """
    kept = targets_T >= 0
    z, targets = z_TD[kept].to(compute_dtype(z_TD)), targets_T[kept]
    log_chance = log_chance[kept] if log_chance.ndim == 2 else log_chance
    own_T = (z * weight_VD.index_select(0, targets).to(z.dtype)).sum(-1)
    others_TS = _product_in(precision, z, weight_VD.index_select(0, sample_S).to(z.dtype))
    loss_T = _against_sample(own_T, others_TS, targets, sample_S, log_chance)
    return weighted_mean(loss_T, None if weight_T is None else weight_T[kept])


def square_sums(tensors: Sequence[Tensor], parts: Sequence[Sequence[int]] | None = None) -> list[float]:
    """The sum of the squares of each tensor's elements, or of each of its parts of so many elements, in float64: not
    finite exactly where one of them is not."""
    flat = [x.detach().reshape(-1) for x in tensors]
    if parts is not None:
        flat = [piece for x, sizes in zip(flat, parts, strict=True) for piece in torch.split(x, list(sizes))]
    return [float(x.double().square().sum()) for x in flat]


class AdamWTensors(NamedTuple):
    """A parameter's update: its gradient, moments and number of updates so far (a float32 scalar), its weight decay."""

    parameter: Tensor
    gradient: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    decay: float


# Neighbours, in memory order, that `adamw` updates together or, where one's moments would not be finite, not at all.
ADAMW_BLOCK = 256


@torch.no_grad()
def adamw(
    updates: Sequence[AdamWTensors], *, lr: float, scale: float, beta1: float, beta2: float, eps: float
) -> list[bool]:
    """One update of each tensor in place (arXiv 1711.05101, algorithm 2; g counts `scale` times):

        m = beta1 m + (1 - beta1) g        v = beta2 v + (1 - beta2) g^2        t = t + 1
        p = (1 - lr decay) p - lr (m / (1 - beta1^t)) / (sqrt(v / (1 - beta2^t)) + eps)

    Returns for which tensors m or v would not have been finite somewhere: the block around that stays as it is.
    """
    return [_adamw(u, lr, scale, beta1, beta2, eps) for u in updates]


def _adamw(u: AdamWTensors, lr: float, scale: float, beta1: float, beta2: float, eps: float) -> bool:
    dtype = compute_dtype(u.parameter)
    p, g, m, v = (x.to(dtype) for x in u[:4])
    t = float(u.step) + 1.0
    m = beta1 * m + (1 - beta1) * scale * g
    v = beta2 * v + (1 - beta2) * (scale * g).square()
    p = (1 - lr * u.decay) * p - lr / (1 - beta1**t) * m / ((v / (1 - beta2**t)).sqrt() + eps)
    finite = torch.cat([b.all().expand(len(b)) for b in torch.split((m + v).isfinite().flatten(), ADAMW_BLOCK)])
    for old, new in zip((u.parameter, u.exp_avg, u.exp_avg_sq), (p, m, v), strict=True):
        old.copy_(torch.where(finite.view(old.shape), new, old.to(dtype)))
    u.step.add_(1)
    return not bool(finite.all())


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


def matmul_dtype(precision: str, x: Tensor) -> torch.dtype:
    """The dtype of a block's matrix products: that of the computation for "fp32", bfloat16 for "bf16"."""
    if precision == "fp32":
        return compute_dtype(x)
    if precision == "bf16":
        return torch.bfloat16
    raise ValueError(f"precision: expected 'fp32' or 'bf16', got {precision!r}")


@torch.no_grad()
def mamba_step(x_BD: Tensor, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> Tensor:
    """One token of `mamba_block` for a batch: returns x (B, D) and updates `state` in place. No gradient."""
    out = mamba_block(x_BD[:, None], weights, eps=eps, state=state, return_state=True)
    assert out.state is not None
    state.conv_BKE.copy_(out.state.conv_BKE)
    state.ssm_BEN.copy_(out.state.ssm_BEN)
    return out.x_BLD[:, 0]


def product(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x @ w.T, (T, O): the scores of T rows for O classes; wider than both where their dtypes differ."""
    dtype = torch.promote_types(x_TI.dtype, w_OI.dtype)
    return x_TI.to(dtype) @ w_OI.to(dtype).t()


@torch.no_grad()
def judge_block(
    scores_TC: Tensor,
    start: int,
    judging: Judging,
    *,
    factor: float = 1.0,
    own_T: Tensor | None = None,
    targets_T: Tensor | None = None,
    reserved_R: Tensor | None = None,
) -> None:
    """Adds the scores of the C classes from `start` on to `judging`, in place. No gradient.

    Blocks come in rising order from class 0 on, without gaps: at `start` 0 whatever `judging` held is forgotten. Of its
    K best, the first min(K, classes so far) are written. rank_T counts by `own_T`, the target's own score: every class
    k with not (score_k < own), so NaN counts, and the target itself in any case; those in `reserved_R` never do.
    """
    values_TK, classes_TK, log_sum_T, rank_T = judging
    if values_TK is not None and classes_TK is not None:
        kept = min(start, values_TK.shape[1])
        found_TC = torch.arange(start, start + scores_TC.shape[1]).expand(scores_TC.shape)
        values, order = torch.cat([values_TK[:, :kept], scores_TC], 1).sort(dim=1, descending=True, stable=True)
        best = slice(min(values_TK.shape[1], start + scores_TC.shape[1]))
        classes = torch.cat([classes_TK[:, :kept], found_TC], 1).gather(1, order[:, best])
        values_TK[:, best], classes_TK[:, best] = values[:, best], classes
    if log_sum_T is not None:
        block_T = (factor * scores_TC).logsumexp(1).double()
        log_sum_T.copy_(torch.logaddexp(log_sum_T, block_T) if start else block_T)
    if rank_T is not None and own_T is not None and targets_T is not None:
        classes_C = torch.arange(start, start + scores_TC.shape[1])
        counted_TC = ~(scores_TC < own_T[:, None]) | (classes_C == targets_T[:, None])
        if reserved_R is not None:
            counted_TC &= ~torch.isin(classes_C, reserved_R)
        rank_T.copy_(counted_TC.sum(1) + (rank_T if start else 0))


def decode_step(
    tokens_B: Tensor,
    embedding_ID: Tensor,
    blocks: Sequence[tuple[BlockWeights, BlockState]],
    norm_D: Tensor,
    scoring: LogitProjection,
    *,
    eps: float = 1e-5,
) -> Tensor:
    """Logits (B, V) after one more token of each sequence: embedding, blocks, norm, head. Moves every block's state on
    in place. No gradient."""
    x_BD = embedding_ID[tokens_B]
    for weights, state in blocks:
        x_BD = mamba_step(x_BD, weights, state, eps=eps)
    z_BD = rms_norm(x_BD[:, None], norm_D, eps)[:, 0]
    return scoring.scale * product(unit(z_BD) if scoring.unit else z_BD, scoring.matrix_VD)
