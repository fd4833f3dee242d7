"""separated_prototype_loss: the value of the prototype loss, the gradient of a sampled cross entropy, as one node.

The definition is in `reference`. Of the cross entropy only the gradient is wanted: three matrix products (T, S, D),
some thousand tokens at a time, with a native kernel between them that makes the gradient of cosines in place.
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
from protomamba.kernels.native import Library
from protomamba.kernels.prototype_loss import (
    Angles,
    check_sample,
    check_targets,
    places,
    prototype_loss_backward,
    prototype_loss_forward,
    total_weight,
    valid_tokens,
)

# Tokens at a time: with 1,024 classes their scores stay within 4 MiB.
BLOCK = 1_024


class Sample(NamedTuple):
    """The classes a token is kept away from, in rising order, and the log of each one's chance; None: all of them."""

    classes_S: Tensor | None
    log_chance_S: Tensor | None


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
    """prototype_loss with the gradient of `reference.sampled_cross_entropy`: see `reference.separated_prototype_loss`.

    sample_S: int64 classes in rising order, None for all of them. precision: of the three products with the sample,
    fp32 or bf16. Native for float32. ValueError for shapes that do not fit, for a target of V or more, for a sampled
    class that is none and for another precision.
    """
    sizes = check_shapes(
        "separated_prototype_loss",
        z_TD=z_TD, prototypes_VD=prototypes_VD, targets_T=targets_T, sample_S=sample_S, log_chance_S=log_chance_S,
        weight_T=weight_T,
    )  # fmt: skip
    _check_scale(log_scale, z_TD)
    check_targets("separated_prototype_loss", targets_T, sizes["V"])
    check_sample("separated_prototype_loss", sample_S, sizes["V"])
    dtype = reference.matmul_dtype(precision, z_TD)
    library = native.select("separated_prototype_loss", z_TD, (torch.float32,))
    if library is None:
        return reference.separated_prototype_loss(
            z_TD, prototypes_VD, log_scale, targets_T, sample_S, log_chance_S, weight_T, precision
        )
    z, targets, weight = valid_tokens(z_TD, targets_T, weight_T)
    sample = Sample(
        None if sample_S is None else sample_S.long().contiguous(),
        None if log_chance_S is None else log_chance_S.float().contiguous(),
    )
    prototypes = prototypes_VD.float().contiguous()
    loss: Tensor = native.apply(_SeparatedLoss, library, sample, dtype, z, prototypes, log_scale, targets, weight)
    return loss


def _check_scale(log_scale: Tensor, z_TD: Tensor) -> None:
    """ValueError unless it is one number, where the features are."""
    if log_scale.numel() != 1 or not log_scale.is_floating_point() or log_scale.is_cpu != z_TD.is_cpu:
        found = f"{log_scale.dtype} of shape {tuple(log_scale.shape)} on {log_scale.device}"
        raise ValueError(f"separated_prototype_loss: log_scale: expected a floating-point number, got {found}")


class _SeparatedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        sample: Sample,
        dtype: torch.dtype,
        z: Tensor,
        prototypes: Tensor,
        log_scale: Tensor,
        targets: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        loss, angles = prototype_loss_forward(library, z, prototypes, targets, weight)
        ctx.save_for_backward(z, prototypes, log_scale, targets, weight, *angles)
        ctx.library, ctx.sample, ctx.dtype = library, sample, dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        z, prototypes, log_scale, targets, weight, *held = ctx.saved_tensors
        pull = _Pull(ctx.library, z, prototypes, targets, Angles(*held), ctx.sample, ctx.dtype)
        dz, dprototypes, dlog_scale = pull.gradients(math.exp(float(log_scale)), token_rates(targets, weight, dloss))
        *_, needs_z, needs_prototypes, needs_scale, _, _ = ctx.needs_input_grad
        return (
            *(None, None, None),
            dz if needs_z else None,
            dprototypes if needs_prototypes else None,
            log_scale.new_tensor(dlog_scale) if needs_scale else None,
            *(None, None),
        )


def token_rates(targets: Tensor, weight: Tensor | None, dloss: Tensor) -> Tensor:
    """(T,): what each token's loss counts in the mean, times the incoming gradient. All tokens have a target."""
    factor = float(dloss) / total_weight(targets, weight)
    return torch.full((len(targets),), factor, dtype=torch.float32) if weight is None else weight * factor


class _Pull(NamedTuple):
    """The gradient of the sampled cross entropy."""

    library: Library
    z: Tensor
    prototypes: Tensor
    targets: Tensor
    angles: Angles
    sample: Sample
    dtype: torch.dtype  # of the products with the sample

    def gradients(self, scale: float, rate_T: Tensor) -> tuple[Tensor, Tensor, float]:
        """Of z (T, D), of the prototypes (V, D) and of log s."""
        classes_S = self.sample.classes_S
        unit_SD, inverse_S = _units(self.library, self._rows())
        place_T = self.targets if classes_S is None else places(classes_S, self.targets)
        dunit_SD, dz, down_T = torch.zeros_like(unit_SD), torch.empty_like(self.z), torch.empty_like(rate_T)
        factor_SD = unit_SD.to(self.dtype)
        dlog_scale = torch.zeros((), dtype=torch.float64)
        for start in range(0, len(self.z), BLOCK):
            part = slice(start, start + BLOCK)
            unit = self.z[part] * self.angles.inverse_z[part, None]
            factor = unit.to(self.dtype)
            dcosine = linear(factor, factor_SD).float()
            self._softmax(
                dcosine, scale, place_T[part], self.angles.cosine[part], rate_T[part], down_T[part], dlog_scale
            )
            dproduct = dcosine.to(self.dtype)
            dz[part] = grad_input(dproduct, factor_SD)
            _turn(self.library, unit, self.angles.inverse_z[part], dz[part])
            dunit_SD += grad_weight(dproduct, factor)
        _turn(self.library, unit_SD, inverse_S, dunit_SD)
        if classes_S is None:
            return dz, dunit_SD, float(dlog_scale)
        dprototypes = torch.zeros_like(self.prototypes).index_copy_(0, classes_S, dunit_SD)
        if bool((place_T < 0).any()):
            self._add_the_unsampled(dz, dprototypes, down_T)
        return dz, dprototypes, float(dlog_scale)

    def _rows(self) -> Tensor:
        classes_S = self.sample.classes_S
        return self.prototypes if classes_S is None else self.prototypes.index_select(0, classes_S)

    def _softmax(self, cosine_TS: Tensor, scale: float, *tensors: Tensor) -> None:
        """Turns a block's cosines into the gradient with respect to them, in place."""
        place_T, own_T, rate_T, down_T, dlog_scale = tensors
        self.library.sphere_softmax(
            T=cosine_TS.shape[0], S=cosine_TS.shape[1], scale=scale, rows=cosine_TS,
            log_chance=self.sample.log_chance_S, place=place_T, own=own_T, rate=rate_T, down=down_T,
            dlog_scale=dlog_scale,
        )  # fmt: skip

    def _add_the_unsampled(self, dz: Tensor, dprototypes: Tensor, down_T: Tensor) -> None:
        """The pull between a token and its own class where that is not among the sampled ones."""
        more_z, more_prototypes = prototype_loss_backward(
            self.library, self.z, self.prototypes, self.targets, None, self.angles, 0.0, down_T, True, True
        )
        assert more_z is not None and more_prototypes is not None
        dz += more_z
        dprototypes += more_prototypes


def _units(library: Library, x: Tensor) -> tuple[Tensor, Tensor]:
    """x / |x| of each row, and 1 / |x|."""
    unit, inverse = torch.empty_like(x), native.floats(len(x))
    library.sphere_unit(T=x.shape[0], D=x.shape[1], x=x, unit=unit, inverse=inverse)
    return unit, inverse


def _turn(library: Library, unit: Tensor, inverse: Tensor, gradient: Tensor) -> None:
    """Makes a gradient of unit vectors that of the vectors they came from, in place."""
    library.sphere_turn(T=unit.shape[0], D=unit.shape[1], unit=unit, inverse=inverse, gradient=gradient)
