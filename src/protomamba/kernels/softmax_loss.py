"""softmax_loss: cross entropy from the features, in blocks of tokens. The definition is in `reference`.

The forward pass of a block computes its gradients too (as Liger's fused linear cross entropy does), so that of all
T x V logits only one block's ever exist.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.matmul import grad_input, grad_weight, linear
from protomamba.kernels.prototype_loss import check_targets

# Logits that exist at once: 16 MiB of float32. Below 128 rows the matrix products lose their speed.
BLOCK_LOGITS = 1 << 22
MIN_BLOCK = 128


def softmax_loss(z_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, block: int | None = None) -> Tensor:
    """Mean over targets y >= 0 of -log softmax(z W^T)_y: see `reference.softmax_loss`, which this equals.

    `block` tokens at a time (by default as many as make 4 Mi logits). ValueError for shapes that do not fit, for a
    target of V or more and for a block below 1.
    """
    sizes = check_shapes("softmax_loss", z_TD=z_TD, weight_VD=weight_VD, targets_T=targets_T)
    check_targets("softmax_loss", targets_T, sizes["V"])
    if block is not None and block < 1:
        raise ValueError(f"softmax_loss: block: expected at least 1, got {block}")
    if native.get_kernels() == "reference":
        return reference.softmax_loss(z_TD, weight_VD, targets_T)
    dtype = torch.promote_types(z_TD.dtype, weight_VD.dtype)
    z_TD, weight_VD = z_TD.to(dtype), weight_VD.to(dtype)
    rows = block or max(BLOCK_LOGITS // sizes["V"], MIN_BLOCK)
    keep = native.needs_backward(z_TD, weight_VD)
    loss: Tensor = native.apply(_SoftmaxLoss, keep, rows, z_TD.contiguous(), weight_VD.contiguous(), targets_T.long())
    return loss


class _SoftmaxLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, keep: bool, rows: int, z: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        count = max(int((targets >= 0).sum()), 1)
        needs_z, needs_weight = (keep and needed for needed in ctx.needs_input_grad[2:4])
        dz = torch.empty_like(z) if needs_z else None
        dweight = torch.zeros_like(weight) if needs_weight else None
        total = z.new_zeros((), dtype=torch.float64)
        for start in range(0, z.shape[0], rows):
            part = slice(start, start + rows)
            loss, dlogits = _block_loss(z[part], weight, targets[part], 1.0 / count, keep)
            total += loss
            if dz is not None:
                dz[part] = grad_input(dlogits, weight)
            if dweight is not None:
                dweight += grad_weight(dlogits, z[part])
        ctx.save_for_backward(dz, dweight)
        return (total / count).to(reference.compute_dtype(z))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dz, dweight = (None if g is None else g * dloss.to(g.dtype) for g in ctx.saved_tensors)
        return None, None, dz, dweight, None


def _block_loss(z: Tensor, weight: Tensor, targets: Tensor, scale: float, keep: bool) -> tuple[Tensor, Tensor]:
    """The sum of the losses of some tokens, and `scale` times its gradient with respect to their logits."""
    log_p = torch.log_softmax(linear(z, weight), dim=1, dtype=reference.compute_dtype(z))
    valid_T1 = (targets >= 0).unsqueeze(1)
    index_T1 = targets.clamp_min(0).unsqueeze(1)
    loss = -(log_p.gather(1, index_T1) * valid_T1).sum(dtype=torch.float64)
    if keep:
        log_p.exp_().scatter_add_(1, index_T1, -torch.ones_like(index_T1, dtype=log_p.dtype))
        log_p.mul_(valid_T1.to(log_p.dtype) * scale)
    return loss, log_p.to(z.dtype)
