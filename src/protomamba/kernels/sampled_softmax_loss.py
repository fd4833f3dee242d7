"""sampled_softmax_loss: a softmax's cross entropy against a sample of its classes. The definition is in `reference`.

As in `softmax_loss` the forward pass of a block of tokens computes its gradients too. Both cost O(T S D).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.matmul import grad_input, grad_weight, linear
from protomamba.kernels.prototype_loss import (
    check_sample,
    check_targets,
    places,
    product_dtype,
    total_weight,
    valid_tokens,
)

# Tokens at a time: with 1,024 classes their logits stay within 4 MiB.
BLOCK = 1_024


def sampled_softmax_loss(
    z_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    sample_S: Tensor,
    log_chance: Tensor,
    weight_T: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """The softmax loss from a sample of the wrong classes: see `reference.sampled_softmax_loss`, which this equals.

    sample_S: int64 classes in rising order; log_chance: the log of each one's chance to be in it, (S,) for all tokens
    or (T, S); precision: of the three products with the sample, fp32 or bf16. ValueError for shapes that do not fit,
    for a target of V or more, for a sampled class that is none and for another precision.
    """
    sizes = check_shapes(
        "sampled_softmax_loss",
        z_TD=z_TD, weight_VD=weight_VD, targets_T=targets_T, sample_S=sample_S, weight_T=weight_T,
        log_chance_S=log_chance if log_chance.ndim < 2 else None,
        log_chance_TS=None if log_chance.ndim < 2 else log_chance,
    )  # fmt: skip
    check_targets("sampled_softmax_loss", targets_T, sizes["V"])
    check_sample("sampled_softmax_loss", sample_S, sizes["V"])
    if native.get_kernels() == "reference" or native.in_transform():
        return reference.sampled_softmax_loss(z_TD, weight_VD, targets_T, sample_S, log_chance, weight_T, precision)
    dtype = torch.promote_types(z_TD.dtype, weight_VD.dtype)
    z, targets, weight = valid_tokens(z_TD.to(dtype), targets_T, weight_T)
    keep = native.needs_backward(z_TD, weight_VD)
    matrix, sample_S = weight_VD.to(dtype).contiguous(), sample_S.long().contiguous()
    if log_chance.ndim == 2 and len(z) < len(targets_T):
        log_chance = log_chance[targets_T >= 0]
    given = keep, product_dtype(precision, z), z, matrix, targets, sample_S, log_chance, weight
    loss: Tensor = native.apply(_SampledSoftmax, *given)
    return loss


class _SampledSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, keep: bool, narrow: torch.dtype, z: Tensor, matrix: Tensor, targets: Tensor, *rest: Any
    ) -> Tensor:
        sample_S, log_chance, weight = rest
        dtype = reference.compute_dtype(z)
        rate_T = torch.ones(len(targets), dtype=dtype) if weight is None else weight.to(dtype)
        sampled_SD = matrix.index_select(0, sample_S).to(narrow)
        rows = _Rows(sampled_SD, log_chance.to(dtype).broadcast_to(len(z), -1), places(sample_S, targets))
        total, dz, drows_SD, down_T = rows.pass_over(z, matrix, targets, rate_T / total_weight(targets, weight), keep)
        if keep:
            dmatrix = torch.zeros_like(matrix).index_copy_(0, sample_S, drows_SD)
            missed_M = (rows.place_T < 0).nonzero()[:, 0]
            down_M1, own_M = down_T[missed_M, None].to(z.dtype), targets[missed_M]
            dz.index_add_(0, missed_M, down_M1 * matrix.index_select(0, own_M))
            dmatrix.index_add_(0, own_M, down_M1 * z.index_select(0, missed_M))
            ctx.save_for_backward(dz, dmatrix)
        return total.to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        gradients = (g * dloss.to(g.dtype) for g in ctx.saved_tensors)
        dz, dmatrix = (g if needed else None for g, needed in zip(gradients, ctx.needs_input_grad[2:4], strict=True))
        return None, None, dz, dmatrix, None, None, None, None


class _Rows(NamedTuple):
    """The sampled rows of the matrix (S, D), the logs of their chances, and where in them each token's own class is."""

    rows_SD: Tensor
    log_chance_TS: Tensor
    place_T: Tensor

    def pass_over(
        self, z: Tensor, matrix: Tensor, targets: Tensor, rate_T: Tensor, keep: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The loss, and the gradients of z, of the sampled rows and of the own logits of classes that are not sampled.

        rate_T: what each token's loss counts.
        """
        dz, down_T = torch.empty_like(z), torch.zeros_like(rate_T)
        drows_SD = torch.zeros_like(self.rows_SD, dtype=matrix.dtype)
        total = z.new_zeros((), dtype=torch.float64)
        for start in range(0, len(z), BLOCK):
            part = slice(start, start + BLOCK)
            own = (z[part] * matrix.index_select(0, targets[part])).sum(-1).to(rate_T.dtype)
            z_part = z[part].to(self.rows_SD.dtype)
            dlogits, loss, down_T[part] = self._block(part, z_part, own, rate_T[part])
            total += loss
            if keep:
                dz[part] = grad_input(dlogits, self.rows_SD)
                drows_SD += grad_weight(dlogits, z_part)
        return total, dz, drows_SD, down_T

    def _block(self, part: slice, z: Tensor, own_T: Tensor, rate_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradient of the logits (T, S), the loss, and the gradient of the own logits where not sampled, else 0."""
        place_T = self.place_T[part]
        x = linear(z, self.rows_SD).to(own_T.dtype) - self.log_chance_TS[part]
        inside_K = (place_T >= 0).nonzero()[:, 0]
        place_K = place_T[inside_K]
        x[inside_K, place_K] = -math.inf
        log_sum_T = torch.logaddexp(x.logsumexp(1), own_T)
        loss = ((log_sum_T - own_T).double() * rate_T.double()).sum()
        x.sub_(log_sum_T[:, None]).exp_().mul_(rate_T[:, None])
        down_T = torch.expm1(own_T - log_sum_T) * rate_T
        x[inside_K, place_K] = down_T[inside_K]
        return x.to(z.dtype), loss, down_T.masked_fill(place_T >= 0, 0.0)
