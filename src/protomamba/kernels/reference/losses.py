"""The losses: towards prototypes and of softmax, of all classes and from a sample of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from protomamba.kernels.reference.numbers import compute_dtype, matmul_dtype

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
