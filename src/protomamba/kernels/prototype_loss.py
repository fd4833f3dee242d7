"""prototype_loss: checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.native import Library


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
        loss, angles = prototype_loss_forward(library, z, prototypes, targets)
        ctx.save_for_backward(z, prototypes, targets, *angles)
        ctx.library = library
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        z, prototypes, targets, *angles = ctx.saved_tensors
        _, needs_z, needs_prototypes, _ = ctx.needs_input_grad
        dz, dprototypes = prototype_loss_backward(
            ctx.library, z, prototypes, targets, Angles(*angles), float(dloss), None, needs_z, needs_prototypes
        )
        return None, dz, dprototypes, None


class Angles(NamedTuple):
    """Of each token with a target, (T,): its cosine to its prototype, 1 / |z|, 1 / |prototype|. Others: undefined."""

    cosine: Tensor
    inverse_z: Tensor
    inverse_p: Tensor


def prototype_loss_forward(library: Library, z: Tensor, prototypes: Tensor, targets: Tensor) -> tuple[Tensor, Angles]:
    """The loss of contiguous float32 (T, D), (V, D) and int64 (T,), and what its backward pass needs."""
    n_token, width = z.shape
    loss, angles = native.floats(), Angles(*native.floats(3, n_token))
    library.prototype_loss_forward(
        T=n_token, D=width, V=prototypes.shape[0], factor=0.0,
        z=z, prototypes=prototypes, targets=targets, **angles._asdict(), loss=loss,
    )  # fmt: skip
    return loss / _count(targets), angles


def prototype_loss_backward(
    library: Library,
    z: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    angles: Angles,
    dloss: float,
    dcosine_T: Tensor | None,
    needs_z: bool,
    needs_prototypes: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of z and the prototypes. dcosine: of what else depends on the tokens' cosines."""
    dz = torch.empty_like(z) if needs_z else None
    dprototypes = torch.empty_like(prototypes) if needs_prototypes else None
    library.prototype_loss_backward(
        T=z.shape[0], D=z.shape[1], V=prototypes.shape[0], factor=dloss / _count(targets),
        z=z, prototypes=prototypes, targets=targets, **angles._asdict(),
        dcosine=dcosine_T, dz=dz, dprototypes=dprototypes,
    )  # fmt: skip
    return dz, dprototypes


def _count(targets: Tensor) -> int:
    return max(int((targets >= 0).sum()), 1)
