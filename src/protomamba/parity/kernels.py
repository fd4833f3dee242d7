"""Every native op against its float64 twin, at every CPU level that runs here: values and all gradients.

An error is RMS(native - twin) / RMS(twin), the latter at least SMALLEST: the inputs are of size 1, and the ratio to a
sum that cancels would measure the sum.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from protomamba import kernels
from protomamba.errors import UserError
from protomamba.kernels import BlockState, BlockWeights, native, reference
from protomamba.parity.report import Report

VALUE, GRADIENT = 2e-6, 2e-5
SMALLEST = 1e-2
# B, L, E, N: single positions, odd lengths, widths that fill no vector, few and many states.
SHAPES = ((1, 1, 5, 1), (2, 63, 24, 16), (1, 257, 33, 5), (3, 64, 32, 16), (2, 100, 17, 64), (1, 129, 64, 16))
RANK, TAPS, CLASSES = 3, 4, 29
Inputs = dict[str, Tensor]
Op = Callable[[Any, Inputs], Tensor]


def run(seed: int, random_shapes: int = 0) -> Report:
    """Compare on the fixed shapes and on `random_shapes` drawn ones. UserError without native kernels."""
    found, why = native.available()
    if not found:
        raise UserError(f"parity kernels: there are no native kernels to compare: {why}")
    report = Report("native kernels against their float64 twins")
    report.facts["shapes"] = f"{len(SHAPES)} fixed, {random_shapes} random, seed {seed}"
    generator = torch.Generator().manual_seed(seed)
    shapes = [*SHAPES, *(_random_shape(generator) for _ in range(random_shapes))]
    for level in native.levels():
        with _at(level):
            for name, (make, op) in OPS.items():
                values: dict[str, float] = {}
                gradients: dict[str, float] = {}
                for shape in shapes:
                    value, each = _compare(op, make(shape, generator))
                    where = "B{}-L{}-E{}-N{}".format(*shape)
                    values[where] = value
                    gradients |= {f"{input_} at {where}": error for input_, error in each.items()}
                report.worst_of(f"{level}: {name}", values, VALUE)
                if gradients:
                    report.worst_of(f"{level}: {name}, gradients", gradients, GRADIENT)
    return report


@contextmanager
def _at(level: str) -> Iterator[None]:
    """Run a block at one CPU level."""
    before = native.get_kernels()
    native.set_kernels("native")
    native.set_level(level)
    try:
        yield
    finally:
        native.set_level(None)
        native.set_kernels(before)


def _compare(op: Op, inputs: Inputs) -> tuple[float, dict[str, float]]:
    """Errors of the value and of each gradient of a random projection of it; none for an op without gradient."""
    narrow = {name: x.clone().requires_grad_(x.is_floating_point()) for name, x in inputs.items()}
    wide = {
        n: (x.double() if x.is_floating_point() else x).requires_grad_(x.is_floating_point()) for n, x in inputs.items()
    }
    found, expected = op(kernels, narrow), op(reference, wide)
    if not expected.requires_grad:
        return _error(found, expected), {}
    weight = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    names = [name for name, x in inputs.items() if x.is_floating_point()]
    got = torch.autograd.grad((found.double() * weight).sum(), [narrow[n] for n in names])
    want = torch.autograd.grad((expected * weight).sum(), [wide[n] for n in names])
    return _error(found, expected), {n: _error(g, w) for n, g, w in zip(names, got, want, strict=True)}


def _error(found: Tensor, expected: Tensor) -> float:
    expected = expected.detach()
    error = (found.detach().double() - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp_min(SMALLEST))


def _random_shape(generator: torch.Generator) -> tuple[int, int, int, int]:
    highest = (4, 200, 80, 33)
    b, length, e, n = (int(torch.randint(1, top, (), generator=generator)) for top in highest)
    return b, length, e, n


def _scan_inputs(shape: tuple[int, int, int, int], g: torch.Generator) -> Inputs:
    b, length, e, n = shape
    return {
        "u": torch.randn(b, length, e, generator=g),
        "delta": torch.randn(b, length, e, generator=g),
        "A": -torch.rand(e, n, generator=g) - 0.05,
        "B": torch.randn(b, length, n, generator=g),
        "C": torch.randn(b, length, n, generator=g),
        "skip": torch.randn(e, generator=g),
        "z": torch.randn(b, length, e, generator=g),
        "delta_bias": torch.randn(e, generator=g),
        "initial_state": torch.randn(b, e, n, generator=g),
        "reset": torch.rand(b, length, generator=g) < 0.05,
    }


def _scan(ops: Any, x: Inputs) -> Tensor:
    y, last = ops.selective_scan(
        *(x["u"], x["delta"], x["A"], x["B"], x["C"], x["skip"], x["z"], x["delta_bias"]),
        delta_softplus=True,
        initial_state_BEN=x["initial_state"],
        return_last_state=True,
        reset_BL=x["reset"],
    )
    return torch.cat([y.flatten(), last.flatten()])


def _conv_inputs(shape: tuple[int, int, int, int], g: torch.Generator) -> Inputs:
    b, length, e, _ = shape
    return {
        "u": torch.randn(b, length, e, generator=g),
        "weight": torch.randn(e, 1, TAPS, generator=g),
        "bias": torch.randn(e, generator=g),
        "initial_state": torch.randn(b, TAPS - 1, e, generator=g),
        "reset": torch.rand(b, length, generator=g) < 0.05,
    }


def _conv(ops: Any, x: Inputs) -> Tensor:
    y, last = ops.causal_conv(x["u"], x["weight"], x["bias"], x["initial_state"], True, x["reset"])
    return torch.cat([y.flatten(), last.flatten()])


def _norm_inputs(shape: tuple[int, int, int, int], g: torch.Generator) -> Inputs:
    b, length, e, _ = shape
    rows = {name: torch.randn(b, length, e, generator=g) for name in ("x", "residual")}
    return {**rows, "weight": torch.randn(e, generator=g)}


def _norm(ops: Any, x: Inputs) -> Tensor:
    normed, total = ops.add_rms_norm(x["x"], x["residual"], x["weight"])
    return torch.cat([normed.flatten(), total.flatten(), ops.rms_norm(x["x"], x["weight"]).flatten()])


def _head_inputs(shape: tuple[int, int, int, int], g: torch.Generator) -> Inputs:
    b, length, e, _ = shape
    classes = {name: torch.randn(CLASSES, e, generator=g) for name in ("prototypes", "weight")}
    targets = torch.randint(-1, CLASSES, (b * length,), generator=g)
    return {"z": torch.randn(b * length, e, generator=g), **classes, "targets": targets}


def _heads(ops: Any, x: Inputs) -> Tensor:
    prototype = ops.prototype_loss(x["z"], x["prototypes"], x["targets"])
    return torch.stack([prototype, ops.softmax_loss(x["z"], x["weight"], x["targets"])])


def _separated_inputs(shape: tuple[int, int, int, int], g: torch.Generator) -> Inputs:
    inputs = {key: x for key, x in _head_inputs(shape, g).items() if key != "weight"}
    sample = torch.randperm(CLASSES, generator=g)[: CLASSES // 2].sort().values
    return {**inputs, "sample": sample, "chance": -torch.rand(len(sample), generator=g)}


def _separated(ops: Any, x: Inputs) -> Tensor:
    found: Tensor = ops.separated_prototype_loss(
        *(x["z"], x["prototypes"], x["targets"], x["sample"], x["chance"].detach()), sharpness=20.0, weight=3.0
    )
    return found + 0.0 * x["chance"].sum()


def _block_inputs(shape: tuple[int, int, int, int], g: torch.Generator, compact: bool = False) -> Inputs:
    b, length, e, n = shape
    d = e if compact else max(1, e // 2)

    def matrix(*size: int) -> Tensor:
        return torch.randn(*size, generator=g) / math.sqrt(size[-1])

    in_proj = {} if compact else {"in_proj_WD": matrix(2 * e, d)}
    return {
        "x": torch.randn(b, length, d, generator=g),
        "norm_D": torch.randn(d, generator=g),
        **in_proj,
        "conv_weight_E1K": torch.randn(e, 1, TAPS, generator=g),
        "conv_bias_E": torch.randn(e, generator=g),
        "x_proj_SE": matrix(RANK + 2 * n, e),
        "dt_proj_ER": matrix(e, RANK),
        "dt_bias_E": torch.randn(e, generator=g),
        "A_log_EN": torch.rand(e, n, generator=g),
        "D_E": torch.randn(e, generator=g),
        "out_proj_DE": matrix(d, e),
        "state_conv": torch.randn(b, TAPS - 1, e, generator=g),
        "state_ssm": torch.randn(b, e, n, generator=g),
    }


def _compact_inputs(shape: tuple[int, int, int, int], g: torch.Generator) -> Inputs:
    return _block_inputs(shape, g, compact=True)


def _block(ops: Any, x: Inputs) -> Tensor:
    weights = BlockWeights(**{name: x.get(name) for name in BlockWeights._fields})  # type: ignore[arg-type]
    state = BlockState(x["state_conv"], x["state_ssm"])
    out = ops.mamba_block(x["x"], weights, state=state, return_state=True)
    return torch.cat([out.x_BLD.flatten(), out.state.conv_BKE.flatten(), out.state.ssm_BEN.flatten()])


def _steps(ops: Any, x: Inputs) -> Tensor:
    """Three positions, one after another; the states are the op's to change."""
    weights = BlockWeights(**{name: x.get(name) for name in BlockWeights._fields})  # type: ignore[arg-type]
    state = BlockState(x["state_conv"].detach().clone(), x["state_ssm"].detach().clone())
    with torch.no_grad():
        outs = [ops.mamba_step(x["x"][:, t % x["x"].shape[1]], weights, state) for t in range(3)]
    return torch.cat([*(out.flatten() for out in outs), *(part.flatten() for part in state)])


def _product(ops: Any, x: Inputs) -> Tensor:
    with torch.no_grad():
        found: Tensor = ops.product(x["z"][:8], x["weight"])
    return found


OPS: dict[str, tuple[Callable[[tuple[int, int, int, int], torch.Generator], Inputs], Op]] = {
    "selective_scan": (_scan_inputs, _scan),
    "causal_conv": (_conv_inputs, _conv),
    "rms_norm": (_norm_inputs, _norm),
    "prototype_loss, softmax_loss": (_head_inputs, _heads),
    "separated_prototype_loss": (_separated_inputs, _separated),
    "product": (_head_inputs, _product),
    "mamba_block": (_block_inputs, _block),
    "mamba_block, compact": (_compact_inputs, _block),
    "mamba_step": (_block_inputs, _steps),
}
