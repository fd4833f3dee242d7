"""prototype_loss: checks, and its gradient on the native kernels. The definition is in `reference`."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.first_order import once_differentiable
from protomamba.kernels.native import Library


def prototype_loss(z_TD: Tensor, prototypes_VD: Tensor, targets_T: Tensor, weight_T: Tensor | None = None) -> Tensor:
    """Mean over targets y >= 0 of (1 - cos(z, p_y))^2, weighted by `weight_T` where that is given: see
    `reference.prototype_loss`, which this equals.

    Costs O(T D) whatever V is, but for clearing the prototypes' gradient. Native for float32. ValueError for shapes
    that do not fit and for a target of V or more.
    """
    sizes = check_shapes(
        "prototype_loss", z_TD=z_TD, prototypes_VD=prototypes_VD, targets_T=targets_T, weight_T=weight_T
    )
    check_targets("prototype_loss", targets_T, sizes["V"])
    library = native.select("prototype_loss", z_TD, (torch.float32,))
    if library is None:
        return reference.prototype_loss(z_TD, prototypes_VD, targets_T, weight_T)
    z, targets, weight = valid_tokens(z_TD, targets_T, weight_T)
    prototypes = prototypes_VD.float().contiguous()
    loss: Tensor = native.apply(_PrototypeLoss, library, z, prototypes, targets, weight)
    return loss


def valid_tokens(z_TD: Tensor, targets_T: Tensor, weight_T: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """z, targets and float32 weights of the tokens whose target counts, contiguous: the others cost nothing."""
    kept_T = targets_T >= 0
    z, targets, weight = z_TD, targets_T.long(), None if weight_T is None else weight_T.float()
    if not bool(kept_T.all()):
        kept_K = kept_T.nonzero()[:, 0]
        z, targets = z.index_select(0, kept_K), targets.index_select(0, kept_K)
        weight = None if weight is None else weight.index_select(0, kept_K)
    return z.contiguous(), targets.contiguous(), None if weight is None else weight.contiguous()


def product_dtype(precision: str, x: Tensor) -> torch.dtype:
    """Of a loss's products: that of x for "fp32", bfloat16 for "bf16". ValueError for another precision."""
    return x.dtype if precision == "fp32" else reference.matmul_dtype(precision, x)


def check_targets(op: str, targets_T: Tensor, classes: int) -> None:
    """ValueError if a target is not below the number of classes."""
    largest = int(targets_T.max())
    if largest >= classes:
        raise ValueError(f"{op}: targets_T: expected values below V={classes}, got {largest}")


def check_sample(op: str, sample_S: Tensor | None, classes: int) -> None:
    """ValueError for a class that there is not, where a kernel would read beside the rows, or that comes twice."""
    if sample_S is None:
        return
    if bool((sample_S[1:] <= sample_S[:-1]).any()):
        raise ValueError(f"{op}: sample_S: expected different classes in rising order")
    low, high = int(sample_S[0]), int(sample_S[-1])
    if low < 0 or high >= classes:
        raise ValueError(f"{op}: sample_S: expected classes from 0 to {classes - 1}, found {low} to {high}")


def places(classes_S: Tensor, targets_T: Tensor) -> Tensor:
    """(T,): where each token's class stands among the sampled ones (rising), -1: nowhere."""
    place_T = torch.searchsorted(classes_S, targets_T).clamp_max(len(classes_S) - 1)
    return torch.where(classes_S[place_T] == targets_T, place_T, -1)


class _PrototypeLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, library: Library, z: Tensor, prototypes: Tensor, targets: Tensor, weight: Tensor | None
    ) -> Tensor:
        loss, angles = prototype_loss_forward(library, z, prototypes, targets, weight)
        ctx.save_for_backward(z, prototypes, targets, weight, *angles)
        ctx.library = library
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        z, prototypes, targets, weight, *angles = ctx.saved_tensors
        _, needs_z, needs_prototypes, _, _ = ctx.needs_input_grad
        dz, dprototypes = prototype_loss_backward(
            ctx.library, z, prototypes, targets, weight, Angles(*angles), float(dloss), None, needs_z, needs_prototypes
        )
        return None, dz, dprototypes, None, None


class Angles(NamedTuple):
    """Of each token, (T,): its cosine to its prototype, 1 / |z|, 1 / |prototype|."""

    cosine: Tensor
    inverse_z: Tensor
    inverse_p: Tensor


def prototype_loss_forward(
    library: Library, z: Tensor, prototypes: Tensor, targets: Tensor, weight: Tensor | None
) -> tuple[Tensor, Angles]:
    """The loss of contiguous float32 (T, D), (V, D), (T,) and int64 (T,), and what its backward pass needs."""
    n_token, width = z.shape
    loss, angles = native.floats(), Angles(*native.floats(3, n_token))
    library.prototype_loss_forward(
        T=n_token, D=width, V=prototypes.shape[0], factor=0.0,
        z=z, prototypes=prototypes, targets=targets, weight=weight, **angles._asdict(), loss=loss,
    )  # fmt: skip
    return loss / total_weight(targets, weight), angles


def prototype_loss_backward(
    library: Library,
    z: Tensor,
    prototypes: Tensor,
    targets: Tensor,
    weight: Tensor | None,
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
        T=z.shape[0], D=z.shape[1], V=prototypes.shape[0], factor=dloss / total_weight(targets, weight),
        z=z, prototypes=prototypes, targets=targets, weight=weight, **angles._asdict(),
        dcosine=dcosine_T, dz=dz, dprototypes=dprototypes,
    )  # fmt: skip
    return dz, dprototypes


def total_weight(targets: Tensor, weight: Tensor | None) -> float:
    """What a sum over tokens, all of them with a target, is divided by for their mean; 1 where nothing counts."""
    total = float(len(targets)) if weight is None else float(weight.double().sum())
    return total if total > 0 else 1.0
