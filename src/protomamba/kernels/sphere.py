"""prototype_loss: checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.native import Library, float_bits, pointer


def prototype_loss(z_TD: Tensor, prototypes_VD: Tensor, targets_T: Tensor) -> Tensor:
    """Mean over targets y >= 0 of (1 - cos(z, p_y))^2: see `reference.prototype_loss`, which this equals.

    Costs O(T D) whatever V is, but for clearing the prototypes' gradient. Native for float32. ValueError for shapes
    that do not fit and for a target of V or more.
    """
    sizes = check_shapes("prototype_loss", z_TD=z_TD, prototypes_VD=prototypes_VD, targets_T=targets_T)
    check_targets("prototype_loss", targets_T, sizes["V"])
    library = native.select("prototype_loss", z_TD, (torch.float32,))
    if library is None:
        return reference.prototype_loss(z_TD, prototypes_VD, targets_T)
    z, prototypes = z_TD.contiguous(), prototypes_VD.float().contiguous()
    loss: Tensor = native.apply(_PrototypeLoss, library, z, prototypes, targets_T.long().contiguous())
    return loss


def check_targets(op: str, targets_T: Tensor, classes: int) -> None:
    """ValueError if a target is not below the number of classes."""
    largest = int(targets_T.max())
    if largest >= classes:
        raise ValueError(f"{op}: targets_T: expected values below V={classes}, got {largest}")


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, library: Library, z: Tensor, prototypes: Tensor, targets: Tensor) -> Tensor:
        n_token, width = z.shape
        loss, per_token = torch.empty(()), torch.empty(3, n_token)
        library.call(
            "sphere_forward",
            n_token, width, prototypes.shape[0],
            pointer(z), pointer(prototypes), pointer(targets), *(pointer(row) for row in per_token), pointer(loss),
            0, 0, 0,
        )  # fmt: skip
        ctx.save_for_backward(z, prototypes, targets, per_token)
        ctx.library, ctx.count = library, max(int((targets >= 0).sum()), 1)
        mean: Tensor = loss / ctx.count
        return mean

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        z, prototypes, targets, per_token = ctx.saved_tensors
        _, needs_z, needs_prototypes, _ = ctx.needs_input_grad
        dz = torch.empty_like(z) if needs_z else None
        dprototypes = torch.empty_like(prototypes) if needs_prototypes else None
        ctx.library.call(
            "sphere_backward",
            *z.shape, prototypes.shape[0],
            pointer(z), pointer(prototypes), pointer(targets), *(pointer(row) for row in per_token), 0,
            float_bits(float(dloss) / ctx.count), pointer(dz), pointer(dprototypes),
        )  # fmt: skip
        return None, dz, dprototypes, None
