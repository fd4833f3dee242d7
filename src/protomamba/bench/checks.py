"""No speed without a correct result: what is timed is first held against the reference path on a small case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from torch import Tensor

from protomamba.bench.shapes import Shape, build
from protomamba.errors import UserError
from protomamba.kernels import native
from protomamba.kernels.closeness import rms_ratio

# RMS of the difference over RMS of the reference's result, both in the path's own precision.
TOLERANCES = {"fp32": 1e-4, "bf16": 5e-2}
CHECK_LENGTH, CHECK_BATCH, CHECK_LAYERS = 32, 2, 1


@contextmanager
def kernels_set(mode: str) -> Iterator[None]:
    """The kernels' path in the block."""
    before = native.get_kernels()
    native.set_kernels(mode)
    try:
        yield
    finally:
        native.set_kernels(before)


def assert_step_agrees(shape: Shape, precision: str) -> None:
    """UserError unless a small step of this width has the reference's loss and gradients."""
    small = replace(
        shape, batch=min(shape.batch, CHECK_BATCH), length=min(shape.length, CHECK_LENGTH), layers=CHECK_LAYERS
    )
    trainer, _ = build(small, precision)
    tokens_BL, targets_BL = small.batches()
    start = {name: x.clone() for name, x in trainer.model.state_dict().items()}
    found = {}
    for mode in ("reference", "native"):
        trainer.zero_grad()
        trainer.model.load_state_dict(start)  # the head counts its draws: both paths are to see the same ones
        with kernels_set(mode):
            loss = trainer.model(tokens_BL, targets_BL)
            loss.backward()
        found[mode] = {"loss": loss.detach(), **{n: g.clone() for n, g in trainer.gradients().items()}}
    assert_close(f"step {shape.name} ({precision})", found["native"], found["reference"], TOLERANCES[precision])


def assert_close(what: str, found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float) -> None:
    """UserError naming every result that is off by more than `tolerance`; a NaN is."""
    errors = {name: rms_ratio(found[name], expected[name]) for name in expected}
    wrong = [f"{name} by {error:.1e}" for name, error in errors.items() if not error <= tolerance]
    if wrong:
        raise UserError(
            f"bench: no speed for {what}: its results differ from the reference path's by more than {tolerance:g}: "
            f"{', '.join(wrong[:5])}; run make test"
        )
