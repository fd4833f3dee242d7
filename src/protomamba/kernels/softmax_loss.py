"""softmax_loss: cross entropy from the features, in blocks of tokens. The definition is in `reference`.

The forward pass of a block computes its gradients too (as Liger's fused linear cross entropy does), so that of all
T x V logits only one block's ever exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.matmul import grad_input, grad_weight, linear
from protomamba.kernels.prototype_loss import check_targets, product_dtype, total_weight, valid_tokens

# Logits that exist at once: 16 MiB of float32. Below 128 rows the matrix products lose their speed.
BLOCK_LOGITS = 1 << 22
MIN_BLOCK = 128


def softmax_loss(
    z_TD: Tensor,
    weight_VD: Tensor,
    targets_T: Tensor,
    weight_T: Tensor | None = None,
    block: int | None = None,
    precision: str = "fp32",
) -> Tensor:
    """Mean over targets y >= 0 of -log softmax(z W^T)_y, weighted by `weight_T` where that is given: see
    `reference.softmax_loss`, which this equals.

    `block` tokens at a time (by default as many as make 4 Mi logits); precision: of the three products, fp32 or bf16.
    ValueError for shapes that do not fit, for a target of V or more, for a block below 1 and for another precision.
    """
    sizes = check_shapes("softmax_loss", z_TD=z_TD, weight_VD=weight_VD, targets_T=targets_T, weight_T=weight_T)
    check_targets("softmax_loss", targets_T, sizes["V"])
    if block is not None and block < 1:
        raise ValueError(f"softmax_loss: block: expected at least 1, got {block}")
    if native.get_kernels() == "reference" or native.in_transform():
        return reference.softmax_loss(z_TD, weight_VD, targets_T, weight_T, precision=precision)
    dtype = torch.promote_types(z_TD.dtype, weight_VD.dtype)
    z_TD, weight_VD = z_TD.to(dtype), weight_VD.to(dtype)
    narrow = product_dtype(precision, z_TD)
    rows = block or max(BLOCK_LOGITS // sizes["V"], MIN_BLOCK)
    keep = native.needs_backward(z_TD, weight_VD)
    z, targets, weight = valid_tokens(z_TD, targets_T, weight_T)
    loss: Tensor = native.apply(_SoftmaxLoss, keep, rows, narrow, z, weight_VD.contiguous(), targets, weight)
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        keep: bool,
        rows: int,
        narrow: torch.dtype,
        z: Tensor,
        matrix: Tensor,
        targets: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        whole = total_weight(targets, weight)
        dtype = reference.compute_dtype(z)
        rate_T = (torch.ones(len(targets), dtype=dtype) if weight is None else weight.to(dtype)) / whole
        needs_z, needs_matrix = (keep and needed for needed in ctx.needs_input_grad[3:5])
        dz = torch.empty_like(z) if needs_z else None
        dmatrix = torch.zeros_like(matrix) if needs_matrix else None
        total, factor = z.new_zeros((), dtype=torch.float64), matrix.to(narrow)
        for start in range(0, z.shape[0], rows):
            part = slice(start, start + rows)
            z_part = z[part].to(narrow)
            loss, dlogits = _block_loss(z_part, factor, targets[part], rate_T[part], keep)
            total += loss
            if dz is not None:
                dz[part] = grad_input(dlogits, factor)
            if dmatrix is not None:
                dmatrix += grad_weight(dlogits, z_part)
        ctx.save_for_backward(dz, dmatrix)
        return total.to(reference.compute_dtype(z))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dz, dmatrix = (None if g is None else g * dloss.to(g.dtype) for g in ctx.saved_tensors)
        return None, None, None, dz, dmatrix, None, None


def _block_loss(z: Tensor, matrix: Tensor, targets: Tensor, rate_T: Tensor, keep: bool) -> tuple[Tensor, Tensor]:
    """The sum of the losses of some tokens, each times its rate, and its gradient with respect to their logits."""
    log_p = torch.log_softmax(linear(z, matrix), dim=1, dtype=reference.compute_dtype(z))
    index_T1 = targets.unsqueeze(1)
    loss = -(log_p.gather(1, index_T1)[:, 0].double() * rate_T.double()).sum()
    if keep:
        log_p.exp_().scatter_add_(1, index_T1, -torch.ones_like(index_T1, dtype=log_p.dtype))
        log_p.mul_(rate_T[:, None])
    return loss, log_p.to(z.dtype)
