"""Times single ops, forward and backward, native against reference, on tensors of the sizes they get in a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from protomamba import kernels
from protomamba.bench.checks import TOLERANCES, assert_close, kernels_set
from protomamba.bench.floor import own_floor, products
from protomamba.bench.shapes import Shape
from protomamba.bench.timing import interleave
from protomamba.errors import ConfigError
from protomamba.kernels.cases import CASES, Case, Inputs, Sizes

# The reference walks a sequence in Python: it is checked, and timed, on rows of at most this length.
REFERENCE_LENGTH, REFERENCE_ROUNDS = 64, 3
SAMPLED = 512  # classes of a sample

# What training and validation have of each: the other ways to call it are for decoding.
DECODING = ("product", "mamba_step")
OPS = {name: case for name, case in CASES.items() if name not in DECODING}


def sizes_of(shape: Shape) -> Sizes:
    """The sizes that an op has in a step of this shape."""
    config, compact = shape.config(), shape.layer != "mamba"
    return Sizes(
        B=shape.batch,
        L=shape.length,
        D=shape.d_model,
        E=shape.d_model * (1 if compact else config.expand),
        N=config.d_state,
        R=1 if compact else config.time_step_rank,
        K=config.d_conv,
        V=shape.vocab_size,
        S=SAMPLED,
    )


def _inputs(case: Case, shape: Shape) -> Inputs:
    return case.inputs(sizes_of(shape), without=case.carried)


def measure_op(name: str, shape: Shape, rounds: int, clock: str) -> dict[str, Any]:
    """One row: forward and backward of a native op, and what the reference path takes. UserError if the op is wrong.

    An op without gradients has a forward alone. GB/s counts each input, output and gradient once: what has to be moved,
    not what is. "/ floor" is against the matrix products of one block (own floor).
    """
    if name not in OPS:
        raise ConfigError(f"--op {name!r}: expected one of {', '.join(OPS)}")
    torch.manual_seed(0)
    small = replace(shape, length=min(shape.length, REFERENCE_LENGTH))
    short = _timed(name, small)
    _check(name, small)
    whole = list(short)[-1]
    reference = interleave({m: _on(m, short[whole]) for m in ("reference", "native")}, REFERENCE_ROUNDS)
    runs = _timed(name, shape)
    floor = own_floor(products(replace(shape, layers=1)))
    samples = interleave({**runs, "floor": floor}, rounds, clock)
    moved = _bytes(name, shape)
    return {
        "op": name,
        "shape": shape.text,
        "forward_ms": 1e3 * samples.median("forward"),
        "forward_backward_ms": 1e3 * samples.median(whole),
        "gb_per_s": moved / samples.median(whole) / 1e9,
        "forward / own floor": samples.ratio("forward", "floor"),
        "forward + backward / own floor": samples.ratio(whole, "floor"),
        "reference / native": reference.ratio("reference", "native").median,
        "reference_at": f"{small.batch} x {small.length}",
    }


def _timed(name: str, shape: Shape) -> dict[str, Callable[[], object]]:
    case = OPS[name]
    inputs = _inputs(case, shape)
    wanted = case.wanting(inputs)
    leaves = [x for x in wanted.values() if x.requires_grad]
    with torch.no_grad():
        dy = torch.randn_like(case.call(kernels, inputs)[0])

    def forward() -> None:
        with torch.no_grad():
            case.call(kernels, inputs)

    def both() -> None:
        torch.autograd.grad(case.call(kernels, wanted)[0], leaves, dy)

    return {"forward": forward, "forward + backward": both} if leaves else {"forward": forward}


def _on(mode: str, run: Callable[[], object]) -> Callable[[], object]:
    def there() -> None:
        with kernels_set(mode):
            run()

    return there


def _check(name: str, shape: Shape) -> None:
    """UserError unless result and gradients are the reference's."""
    case = OPS[name]
    inputs = _inputs(case, shape)
    found = {}
    directions: list[Tensor] = []
    for mode in ("reference", "native"):
        wanted = case.wanting(inputs)
        with kernels_set(mode):
            outputs = case.call(kernels, wanted)
            gradients: Inputs = {}
            if case.differentiable:
                directions = directions or [torch.randn_like(y) for y in outputs]
                gradients = case.gradients(outputs, wanted, directions)
        values = {f"result {i}": y.detach() for i, y in enumerate(outputs)}
        found[mode] = {**values, **{f"gradient of {k}": g for k, g in gradients.items()}}
    assert_close(f"{name} ({shape.name})", found["native"], found["reference"], TOLERANCES["fp32"])


def _bytes(name: str, shape: Shape) -> int:
    case = OPS[name]
    inputs = _inputs(case, shape)
    with torch.no_grad():
        results = case.call(kernels, inputs)
    # Forward reads the inputs, writes the results; backward reads inputs and its gradient, writes the inputs' ones.
    reads, writes = (3, 2) if case.differentiable else (1, 1)
    return 4 * (reads * sum(x.numel() for x in inputs.values()) + writes * sum(x.numel() for x in results))
