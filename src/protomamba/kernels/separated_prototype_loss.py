"""separated_prototype_loss: the prototype loss whose gradient also keeps wrong classes away, as one autograd node.

The definition is in `reference`. Of the term only the gradient is wanted, and that is a softmax over the sampled
classes and the token's own: three matrix products (T, S, D) and little else, some thousand tokens at a time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.matmul import grad_input, grad_weight, linear
from protomamba.kernels.native import Library
from protomamba.kernels.prototype_loss import Angles, check_targets, prototype_loss_backward, prototype_loss_forward

# Tokens at a time: with 512 classes their scores stay within 2 MiB, in the cache.
BLOCK = 1_024
# What a class is scored with that must not count.
NEVER = -1e9


class Sample(NamedTuple):
    """The classes a token is kept away from, sorted, and how."""

    classes_S: Tensor
    log_chance_S: Tensor
    sharpness: float
    weight: float


def separated_prototype_loss(
    z_TD: Tensor,
    prototypes_VD: Tensor,
    targets_T: Tensor,
    sample_S: Tensor,
    log_chance_S: Tensor,
    *,
    sharpness: float,
    weight: float,
) -> Tensor:
    """prototype_loss with the gradient of `weight` times the crowding too: see `reference.separated_prototype_loss`.

    sample_S: int64 classes in rising order. Native for float32. ValueError for shapes that do not fit and for a target
    of V or more.
    """
    sizes = check_shapes(
        "separated_prototype_loss",
        z_TD=z_TD, prototypes_VD=prototypes_VD, targets_T=targets_T, sample_S=sample_S, log_chance_S=log_chance_S,
    )  # fmt: skip
    check_targets("separated_prototype_loss", targets_T, sizes["V"])
    library = native.select("separated_prototype_loss", z_TD, (torch.float32,))
    if library is None:
        return reference.separated_prototype_loss(
            z_TD, prototypes_VD, targets_T, sample_S, log_chance_S, sharpness=sharpness, weight=weight
        )
    sample = Sample(sample_S, log_chance_S.float(), sharpness, weight)
    z, prototypes = z_TD.contiguous(), prototypes_VD.float().contiguous()
    loss: Tensor = native.apply(_SeparatedLoss, library, sample, z, prototypes, targets_T.long().contiguous())
    return loss


class _SeparatedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Library, sample: Sample, z: Tensor, prototypes: Tensor, targets: Tensor) -> Tensor:
        loss, angles = prototype_loss_forward(library, z, prototypes, targets)
        ctx.save_for_backward(z, prototypes, targets, *angles)
        ctx.library, ctx.sample = library, sample
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        z, prototypes, targets, *held = ctx.saved_tensors
        angles, sample = Angles(*held), ctx.sample
        _, _, needs_z, needs_prototypes, _ = ctx.needs_input_grad
        dcosine_T, dz_others, drows = _crowding_backward(z, prototypes, targets, angles, sample, float(dloss))
        dz, dprototypes = prototype_loss_backward(
            ctx.library, z, prototypes, targets, angles, float(dloss), dcosine_T, needs_z, needs_prototypes
        )
        if dz is not None:
            dz += dz_others
        if dprototypes is not None:
            dprototypes.index_add_(0, sample.classes_S, drows)
        return None, None, dz, dprototypes, None


def _crowding_backward(
    z: Tensor, prototypes: Tensor, targets: Tensor, angles: Angles, sample: Sample, dloss: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the tokens' cosines to their own prototypes (T,), of z (T, D) and of the sampled rows (S, D).

    With scores s cos(z, p_k) - log q_k, and s cos(z, p_y) for the token's own class, the term is -1/s log softmax(own):
    its gradient with respect to a cosine is the class's probability, less 1 for the own class.
    """
    count = len(sample.classes_S)
    valid_T = targets >= 0
    rate_T = valid_T.to(z.dtype) * (sample.weight * dloss / max(int(valid_T.sum()), 1))
    # A row of zeros after the sampled ones makes room for the own class, whose score comes from elsewhere.
    rows = prototypes[sample.classes_S]
    norm_S1 = torch.linalg.vector_norm(rows, dim=-1, keepdim=True)
    inverse_S1 = torch.where(norm_S1 < reference.MIN_NORM, 0.0, 1.0 / norm_S1)
    unit_rows = torch.cat([rows * inverse_S1, rows.new_zeros(1, rows.shape[1])])
    inverse_T1 = torch.where(valid_T, angles.inverse_z, 0.0)[:, None]
    own_T = torch.where(valid_T, angles.cosine, 0.0) * sample.sharpness
    place_T = torch.searchsorted(sample.classes_S, targets).clamp_max(count - 1)
    sampled_T = sample.classes_S[place_T] == targets
    dcosine_T, dz, dunit_rows = torch.empty_like(own_T), torch.empty_like(z), torch.zeros_like(unit_rows)
    for start in range(0, len(z), BLOCK):
        part = slice(start, start + BLOCK)
        unit = z[part] * inverse_T1[part]
        scores = linear(unit, unit_rows * sample.sharpness)
        scores[:, :count] -= sample.log_chance_S
        scores[:, count] = own_T[part]
        hidden = sampled_T[part].nonzero()[:, 0]
        scores[hidden, place_T[part][hidden]] = NEVER
        chance = scores.softmax(-1)
        dcosine_T[part] = rate_T[part] * (chance[:, count] - 1.0)
        dunit = grad_input(chance, unit_rows) * rate_T[part, None]
        dz[part] = _tangential(dunit, unit) * inverse_T1[part]
        dunit_rows += grad_weight(chance, unit * rate_T[part, None])
    drows = _tangential(dunit_rows[:count], unit_rows[:count]) * inverse_S1
    return dcosine_T, dz, drows


def _tangential(gradient: Tensor, unit: Tensor) -> Tensor:
    """What of a gradient turns the unit vector instead of stretching it."""
    return gradient - (gradient * unit).sum(-1, keepdim=True) * unit
