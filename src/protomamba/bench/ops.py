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
from protomamba.bench.shapes import VOCABULARY, Shape
from protomamba.bench.timing import interleave
from protomamba.errors import ConfigError
from protomamba.kernels import BlockWeights

# The reference walks a sequence in Python: it is checked, and timed, on rows of at most this length.
REFERENCE_LENGTH, REFERENCE_ROUNDS = 64, 3

Inputs = dict[str, Tensor]
Call = Callable[..., Tensor]


def _randn(*sizes: int) -> Tensor:
    return torch.randn(*sizes)


def _scan(shape: Shape) -> tuple[Call, Inputs]:
    B, L, E, N = shape.batch, shape.length, _inner(shape), shape.config().d_state
    inputs = {
        "u": _randn(B, L, E),
        "delta": _randn(B, L, E) - 3,
        "A": -torch.rand(E, N) * 16,
        "B": _randn(B, L, N),
        "C": _randn(B, L, N),
        "skip": _randn(E),
        "z": _randn(B, L, E),
        "bias": _randn(E),
    }

    def run(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor, z: Tensor, bias: Tensor) -> Tensor:
        y = kernels.selective_scan(u, delta, A, B, C, skip, z, bias, True)
        assert isinstance(y, Tensor)
        return y

    return run, inputs


def _conv(shape: Shape) -> tuple[Call, Inputs]:
    E, K = _inner(shape), shape.config().d_conv
    inputs = {"u": _randn(shape.batch, shape.length, E), "weight": _randn(E, 1, K), "bias": _randn(E)}

    def run(u: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = kernels.causal_conv(u, weight, bias)
        assert isinstance(y, Tensor)
        return y

    return run, inputs


def _norm(shape: Shape) -> tuple[Call, Inputs]:
    inputs = {"x": _randn(shape.batch, shape.length, shape.d_model), "weight": _randn(shape.d_model)}
    return lambda x, weight: kernels.rms_norm(x, weight), inputs


def _add_norm(shape: Shape) -> tuple[Call, Inputs]:
    sizes = shape.batch, shape.length, shape.d_model
    inputs = {"x": _randn(*sizes), "residual": _randn(*sizes), "weight": _randn(shape.d_model)}
    return lambda x, residual, weight: kernels.add_rms_norm(x, residual, weight)[0], inputs


def _prototypes(shape: Shape) -> tuple[Call, Inputs]:
    targets_T = torch.randint(VOCABULARY, (shape.tokens,))
    inputs = {"z": _randn(shape.tokens, shape.d_model), "prototypes": _randn(VOCABULARY, shape.d_model)}
    return lambda z, prototypes: kernels.prototype_loss(z, prototypes, targets_T), inputs


def _softmax(shape: Shape) -> tuple[Call, Inputs]:
    targets_T = torch.randint(VOCABULARY, (shape.tokens,))
    inputs = {"z": _randn(shape.tokens, shape.d_model), "weight": 0.05 * _randn(VOCABULARY, shape.d_model)}
    return lambda z, weight: kernels.softmax_loss(z, weight, targets_T), inputs


def _block(shape: Shape) -> tuple[Call, Inputs]:
    config, E, D = shape.config(), _inner(shape), shape.d_model
    rank = config.time_step_rank if shape.layer == "mamba" else 1
    weights = BlockWeights(
        norm_D=_randn(D),
        in_proj_WD=_randn(2 * E, D) * D**-0.5 if shape.layer == "mamba" else None,
        conv_weight_E1K=_randn(E, 1, config.d_conv),
        conv_bias_E=_randn(E),
        x_proj_SE=_randn(rank + 2 * config.d_state, E) * E**-0.5,
        dt_proj_ER=_randn(E, rank) * rank**-0.5,
        dt_bias_E=_randn(E) - 3,
        A_log_EN=torch.arange(1.0, config.d_state + 1).log().repeat(E, 1),
        D_E=_randn(E),
        out_proj_DE=_randn(D, E) * E**-0.5,
    )
    named = {name: w for name, w in weights._asdict().items() if w is not None}

    def run(x: Tensor, **given: Tensor) -> Tensor:
        in_proj_WD = given.pop("in_proj_WD", None)
        return kernels.mamba_block(x, BlockWeights(in_proj_WD=in_proj_WD, **given)).x_BLD

    return run, {"x": _randn(shape.batch, shape.length, D), **named}


def _inner(shape: Shape) -> int:
    return shape.d_model * (shape.config().expand if shape.layer == "mamba" else 1)


OPS: dict[str, Callable[[Shape], tuple[Call, Inputs]]] = {
    "selective_scan": _scan,
    "causal_conv": _conv,
    "rms_norm": _norm,
    "add_rms_norm": _add_norm,
    "prototype_loss": _prototypes,
    "softmax_loss": _softmax,
    "mamba_block": _block,
}


def measure_op(name: str, shape: Shape, rounds: int, clock: str) -> dict[str, Any]:
    """One row: forward and backward of a native op, and what the reference path takes. UserError if the op is wrong.

    GB/s counts each input, output and gradient once: what has to be moved, not what is. "/ floor" is against the
    matrix products of one block (own floor).
    """
    if name not in OPS:
        raise ConfigError(f"--op {name!r}: expected one of {', '.join(OPS)}")
    torch.manual_seed(0)
    small = replace(shape, length=min(shape.length, REFERENCE_LENGTH))
    short = _timed(name, small)
    _check(name, small)
    reference = interleave({m: _on(m, short["forward + backward"]) for m in ("reference", "native")}, REFERENCE_ROUNDS)
    runs = _timed(name, shape)
    floor = own_floor(products(replace(shape, layers=1)))
    samples = interleave({**runs, "floor": floor}, rounds, clock)
    moved = _bytes(name, shape)
    both = samples.median("forward + backward")
    return {
        "op": name,
        "shape": shape.text,
        "forward_ms": 1e3 * samples.median("forward"),
        "forward_backward_ms": 1e3 * both,
        "gb_per_s": moved / both / 1e9,
        "forward / own floor": samples.ratio("forward", "floor"),
        "forward + backward / own floor": samples.ratio("forward + backward", "floor"),
        "reference / native": reference.ratio("reference", "native").median,
        "reference_at": f"{small.batch} x {small.length}",
    }


def _timed(name: str, shape: Shape) -> dict[str, Callable[[], object]]:
    call, inputs = OPS[name](shape)
    wanted = {k: x.clone().requires_grad_() for k, x in inputs.items()}
    with torch.no_grad():
        dy = torch.randn_like(call(**inputs))

    def forward() -> None:
        with torch.no_grad():
            call(**inputs)

    def both() -> None:
        torch.autograd.grad(call(**wanted), list(wanted.values()), dy)

    return {"forward": forward, "forward + backward": both}


def _on(mode: str, run: Callable[[], object]) -> Callable[[], object]:
    def there() -> None:
        with kernels_set(mode):
            run()

    return there


def _check(name: str, shape: Shape) -> None:
    """UserError unless result and gradients are the reference's."""
    call, inputs = OPS[name](shape)
    found = {}
    dy: Tensor | None = None
    for mode in ("reference", "native"):
        wanted = {k: x.clone().requires_grad_() for k, x in inputs.items()}
        with kernels_set(mode):
            y = call(**wanted)
            dy = torch.randn_like(y) if dy is None else dy
            grads = torch.autograd.grad(y, list(wanted.values()), dy)
        found[mode] = {"result": y.detach(), **{f"gradient of {k}": g for k, g in zip(wanted, grads, strict=True)}}
    assert_close(f"{name} ({shape.name})", found["native"], found["reference"], TOLERANCES["fp32"])


def _bytes(name: str, shape: Shape) -> int:
    call, inputs = OPS[name](shape)
    with torch.no_grad():
        result = call(**inputs)
    # Forward reads the inputs, writes the result; backward reads inputs and its gradient, writes the inputs' ones.
    return 4 * (3 * sum(x.numel() for x in inputs.values()) + 2 * result.numel())
