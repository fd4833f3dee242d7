"""separated_prototype_loss, grouped_prototype_loss: the prototype loss with the gradient of a sampled cross entropy.

The definition is in `reference`. Of the cross entropy only the gradient is wanted: three matrix products (T, S, D),
some thousand tokens at a time, with a native kernel between them that makes the gradient of cosines in place.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
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
    prototype_loss_backward,
    prototype_loss_forward,
    total_weight,
    valid_tokens,
)

# Tokens at a time: with 1,024 classes their scores stay within 4 MiB.
BLOCK = 1_024


class _Held(NamedTuple):
    """A `reference.Sample`; without classes all, without chances each certain, without numbers for all tokens."""

    classes_S: Tensor | None
    log_chance_RS: Tensor | None
    tokens_R: tuple[int, ...] | None

    def check(self, op: str, z_TD: Tensor, classes: int) -> None:
        """ValueError for what does not fit."""
        check_shapes(op, like=z_TD, sample_S=self.classes_S, log_chance_RS=self.log_chance_RS)
        check_sample(op, self.classes_S, classes)
        runs = 1 if self.tokens_R is None else len(self.tokens_R)
        if self.log_chance_RS is not None and len(self.log_chance_RS) != runs:
            raise ValueError(f"{op}: log_chance_RS: expected {runs} rows, got {len(self.log_chance_RS)}")

    def ready(self, tokens: int) -> _Held:
        """As the kernels take it, for so many tokens if nothing else was said."""
        return _Held(
            None if self.classes_S is None else self.classes_S.long().contiguous(),
            None if self.log_chance_RS is None else self.log_chance_RS.float().contiguous(),
            (tokens,) if self.tokens_R is None else self.tokens_R,
        )


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
    check_shapes("separated_prototype_loss", like=z_TD, sample_S=sample_S, log_chance_S=log_chance_S)
    chances_1S = None if log_chance_S is None else log_chance_S[None]
    held = [_Held(sample_S, chances_1S, None)]
    loss = _native("separated_prototype_loss", z_TD, prototypes_VD, log_scale, targets_T, held, weight_T, precision)
    if loss is not None:
        return loss
    return reference.separated_prototype_loss(
        z_TD, prototypes_VD, log_scale, targets_T, sample_S, log_chance_S, weight_T, precision
    )


def grouped_prototype_loss(
    z_TD: Tensor,
    prototypes_VD: Tensor,
    log_scale: Tensor,
    targets_T: Tensor,
    samples: Sequence[reference.Sample],
    weight_T: Tensor | None = None,
    precision: str = "fp32",
) -> Tensor:
    """The same with several samples, each for a group of the tokens: see `reference.grouped_prototype_loss`.

    ValueError too where the samples are not for as many tokens as have a target. One node for all of them, because a
    node for each would write, and add up, gradients of the whole input.
    """
    if not samples:
        raise ValueError("grouped_prototype_loss: samples: expected at least one")
    given = [_Held(*each) for each in samples]
    loss = _native("grouped_prototype_loss", z_TD, prototypes_VD, log_scale, targets_T, given, weight_T, precision)
    if loss is not None:
        return loss
    return reference.grouped_prototype_loss(z_TD, prototypes_VD, log_scale, targets_T, samples, weight_T, precision)


def _native(
    op: str,
    z_TD: Tensor,
    prototypes_VD: Tensor,
    log_scale: Tensor,
    targets_T: Tensor,
    samples: Sequence[_Held],
    weight_T: Tensor | None,
    precision: str,
) -> Tensor | None:
    """The loss on the native kernels, None where they are not to be used; ValueError for arguments that do not fit."""
    sizes = check_shapes(op, z_TD=z_TD, prototypes_VD=prototypes_VD, targets_T=targets_T, weight_T=weight_T)
    _check_scale(op, log_scale, z_TD)
    check_targets(op, targets_T, sizes["V"])
    for sample in samples:
        sample.check(op, z_TD, sizes["V"])
    _check_tokens(op, samples, targets_T)
    dtype = reference.matmul_dtype(precision, z_TD)
    library = native.select(op, z_TD, (torch.float32,))
    if library is None:
        return None
    z, targets, weight = valid_tokens(z_TD, targets_T, weight_T)
    ready = [sample.ready(len(z)) for sample in samples]
    prototypes = prototypes_VD.float().contiguous()
    loss: Tensor = native.apply(_SeparatedLoss, library, ready, dtype, z, prototypes, log_scale, targets, weight)
    return loss


def _check_tokens(op: str, samples: Sequence[_Held], targets_T: Tensor) -> None:
    """ValueError unless the samples are for as many tokens as have a target."""
    if samples[0].tokens_R is None:
        return
    found, expected = sum(sum(sample.tokens_R or ()) for sample in samples), int((targets_T >= 0).sum())
    if found != expected:
        raise ValueError(f"{op}: samples: expected some for {expected} tokens, got for {found}")


def _check_scale(op: str, log_scale: Tensor, z_TD: Tensor) -> None:
    """ValueError unless it is one number, where the features are."""
    if log_scale.numel() != 1 or not log_scale.is_floating_point() or log_scale.is_cpu != z_TD.is_cpu:
        found = f"{log_scale.dtype} of shape {tuple(log_scale.shape)} on {log_scale.device}"
        raise ValueError(f"{op}: log_scale: expected a floating-point number, got {found}")


class _SeparatedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        library: Library,
        samples: Sequence[_Held],
        dtype: torch.dtype,
        z: Tensor,
        prototypes: Tensor,
        log_scale: Tensor,
        targets: Tensor,
        weight: Tensor | None,
    ) -> Tensor:
        loss, angles = prototype_loss_forward(library, z, prototypes, targets, weight)
        ctx.save_for_backward(z, prototypes, log_scale, targets, weight, *angles)
        ctx.library, ctx.samples, ctx.dtype = library, samples, dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        z, prototypes, log_scale, targets, weight, *held = ctx.saved_tensors
        pull = _Pull(ctx.library, z, prototypes, targets, Angles(*held), ctx.samples, ctx.dtype)
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
    """The gradient of the sampled cross entropy. Each sample is that of the next so many tokens."""

    library: Library
    z: Tensor
    prototypes: Tensor
    targets: Tensor
    angles: Angles
    samples: Sequence[_Held]
    dtype: torch.dtype  # of the products with the sample

    def gradients(self, scale: float, rate_T: Tensor) -> tuple[Tensor, Tensor, float]:
        """Of z (T, D), of the prototypes (V, D) and of log s."""
        dz, dprototypes = torch.empty_like(self.z), torch.zeros_like(self.prototypes)
        down_T, dlog_scale = torch.empty_like(rate_T), torch.zeros((), dtype=torch.float64)
        start = 0
        for sample in self.samples:
            group = _Group(self, sample, start, scale)
            group.add_gradients(dz, dprototypes, rate_T, down_T, dlog_scale)
            start = group.stop
        if bool(down_T.any()):
            self._add_the_unsampled(dz, dprototypes, down_T)
        return dz, dprototypes, float(dlog_scale)

    def _add_the_unsampled(self, dz: Tensor, dprototypes: Tensor, down_T: Tensor) -> None:
        """The pull between a token and its own class where that is not among the sampled ones."""
        more_z, more_prototypes = prototype_loss_backward(
            self.library, self.z, self.prototypes, self.targets, None, self.angles, 0.0, down_T, True, True
        )
        assert more_z is not None and more_prototypes is not None
        dz += more_z
        dprototypes += more_prototypes


class _Group(NamedTuple):
    """The tokens from `start` on that share a sample."""

    pull: _Pull
    sample: _Held
    start: int
    scale: float

    @property
    def stop(self) -> int:
        return self.start + sum(self.sample.tokens_R or ())

    def add_gradients(
        self, dz: Tensor, dprototypes: Tensor, rate_T: Tensor, down_T: Tensor, dlog_scale: Tensor
    ) -> None:
        """Writes the tokens' part of dz and down, adds to the gradients of the prototypes and of log s."""
        library, angles = self.pull.library, self.pull.angles
        unit_SD, inverse_S = _units(library, self.pull.prototypes, self.sample.classes_S)
        dunit_SD, factor_SD = None, unit_SD.to(self.pull.dtype)
        for part in self._blocks():
            unit = self.pull.z[part] * angles.inverse_z[part, None]
            factor = unit.to(self.pull.dtype)
            dcosine = linear(factor, factor_SD).float()
            self._softmax(part, dcosine, rate_T, down_T, dlog_scale)
            dproduct = dcosine.to(self.pull.dtype)
            dz[part] = grad_input(dproduct, factor_SD)
            _turn(library, unit, angles.inverse_z[part], dz[part])
            more_SD = grad_weight(dproduct, factor).float()
            dunit_SD = more_SD if dunit_SD is None else dunit_SD.add_(more_SD)
        if dunit_SD is not None:
            _turn(library, unit_SD, inverse_S, dunit_SD, self.sample.classes_S, dprototypes)

    def _blocks(self) -> Iterator[slice]:
        for start in range(self.start, self.stop, BLOCK):
            yield slice(start, min(start + BLOCK, self.stop))

    def _runs(self, part: slice) -> Iterator[tuple[slice, Tensor | None]]:
        """The tokens of each run that lie in a block, and the log chances of that run."""
        start = self.start
        for run, tokens in enumerate(self.sample.tokens_R or ()):
            begin, end = max(start, part.start), min(start + tokens, part.stop)
            if begin < end:
                yield slice(begin, end), None if self.sample.log_chance_RS is None else self.sample.log_chance_RS[run]
            start += tokens

    def _softmax(self, part: slice, cosine_TS: Tensor, rate_T: Tensor, down_T: Tensor, dlog_scale: Tensor) -> None:
        """Turns a block's cosines into the gradient with respect to them, in place."""
        targets_T, own_T = self.pull.targets, self.pull.angles.cosine
        for run, log_chance_S in self._runs(part):
            inside = slice(run.start - part.start, run.stop - part.start)
            self.pull.library.sphere_softmax(
                T=run.stop - run.start, S=cosine_TS.shape[1], scale=self.scale, rows=cosine_TS[inside],
                log_chance=log_chance_S, classes=self.sample.classes_S, targets=targets_T[run], own=own_T[run],
                rate=rate_T[run], down=down_T[run], dlog_scale=dlog_scale,
            )  # fmt: skip


def _units(library: Library, x_VD: Tensor, rows_S: Tensor | None) -> tuple[Tensor, Tensor]:
    """x / |x| of each row, or of these rows, and 1 / |x|."""
    count, width = len(x_VD) if rows_S is None else len(rows_S), x_VD.shape[1]
    unit, inverse = native.floats(count, width), native.floats(count)
    library.sphere_unit(T=count, D=width, x=x_VD, index=rows_S, unit=unit, inverse=inverse)
    return unit, inverse


def _turn(
    library: Library, unit: Tensor, inverse: Tensor, gradient: Tensor, rows_S: Tensor | None = None,
    total: Tensor | None = None,
) -> None:  # fmt: skip
    """Makes a gradient of unit vectors that of the vectors they came from, in place; or adds that to the total, or to
    these rows of it."""
    library.sphere_turn(
        T=unit.shape[0], D=unit.shape[1], unit=unit, inverse=inverse, gradient=gradient, index=rows_S, total=total
    )
