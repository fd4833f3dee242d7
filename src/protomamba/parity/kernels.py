"""Every native op against its float64 twin, at every CPU level that runs here: values and all gradients.

The ops and their inputs are those of `kernels.cases`, the measure and the tolerances those of `kernels.closeness`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from protomamba import kernels
from protomamba.errors import UserError
from protomamba.kernels import native, reference
from protomamba.kernels.cases import CASES, Case, Inputs, Sizes
from protomamba.kernels.closeness import SMALLEST, TOLERANCES, rms_ratio
from protomamba.parity.report import Report

GRADIENT = TOLERANCES["gradient", torch.float32]


def _sizes(B: int, L: int, E: int, N: int) -> Sizes:
    """E channels in the block and outside of it."""
    return Sizes(B=B, L=L, D=E, E=E, N=N)


# Single positions, odd lengths, widths that fill no vector, few and many states.
SIZES = tuple(
    _sizes(*shape)
    for shape in ((1, 1, 5, 1), (2, 63, 24, 16), (1, 257, 33, 5), (3, 64, 32, 16), (2, 100, 17, 64), (1, 129, 64, 16))
)


def run(seed: int, random_shapes: int = 0) -> Report:
    """Compare on the fixed shapes and on `random_shapes` drawn ones. UserError without native kernels."""
    found, why = native.available()
    if not found:
        raise UserError(f"parity kernels: there are no native kernels to compare: {why}")
    report = Report("native kernels against their float64 twins")
    report.facts["shapes"] = f"{len(SIZES)} fixed, {random_shapes} random, seed {seed}"
    generator = torch.Generator().manual_seed(seed)
    every_size = [*SIZES, *(_random_sizes(generator) for _ in range(random_shapes))]
    for level in native.levels():
        with _at(level):
            for name, case in CASES.items():
                values: dict[str, float] = {}
                gradients: dict[str, float] = {}
                for sizes in every_size:
                    value, each = _compare(case, case.inputs(sizes, generator))
                    where = f"B{sizes.B}-L{sizes.L}-E{sizes.E}-N{sizes.N}"
                    values[where] = value
                    gradients |= {f"{input_} at {where}": error for input_, error in each.items()}
                report.worst_of(f"{level}: {name}", values, _tolerance(name))
                if gradients:
                    report.worst_of(f"{level}: {name}, gradients", gradients, GRADIENT)
    return report


def _tolerance(op: str) -> float:
    """Of an op's values: a decoding step is held to its own, as in the tests."""
    return TOLERANCES["step" if op.endswith("_step") else "forward", torch.float32]


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


def _compare(case: Case, inputs: Inputs) -> tuple[float, dict[str, float]]:
    """Errors of the values and of each gradient of a random projection of them; none for an op without gradient."""
    narrow, wide = case.wanting(inputs), case.wanting(inputs, torch.float64)
    found, expected = case.call(kernels, narrow), case.call(reference, wide)
    value = max(rms_ratio(x, y, SMALLEST) for x, y in zip(found, expected, strict=True))
    if not case.differentiable:
        return value, {}
    drawn = torch.Generator().manual_seed(1)
    directions = [torch.randn(x.shape, dtype=torch.float64, generator=drawn) for x in expected]
    got, want = case.gradients(found, narrow, directions), case.gradients(expected, wide, directions)
    return value, {name: rms_ratio(got[name], want[name], SMALLEST) for name in want}


def _random_sizes(generator: torch.Generator) -> Sizes:
    return _sizes(*(int(torch.randint(1, top, (), generator=generator)) for top in (4, 200, 80, 33)))
