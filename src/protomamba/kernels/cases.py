"""One registry of ops for tests, bench and parity: the inputs that each gets at given sizes, and how it is called.

A call takes `ops`, either `protomamba.kernels` or its `reference`, so that an op and its twin are called alike.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from protomamba.kernels.reference import BlockState, BlockWeights, Judging, Sample

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """How large the inputs are. The letters are those at the end of their names; T = B L tokens, V classes, S of them
    sampled."""

    B: int
    L: int
    D: int = 1
    E: int = 1
    N: int = 1
    R: int = 3
    K: int = 4
    V: int = 29
    S: int = 14

    @property
    def T(self) -> int:
        return self.B * self.L


@dataclass(frozen=True)
class Case:
    """One op. Its inputs are of size 1 and named as the op's parameters (those of a block as BlockWeights' fields).

    narrow: what may be bfloat16. carried: what brings a state or a reset into the middle of a sequence. optional: what
    may be left out, `carried` included. differentiable: the inputs that have a gradient; none for an op without.
    """

    make: Callable[[Sizes, Generator | None], Inputs]
    call: Callable[[Any, Inputs], tuple[Tensor, ...]]
    differentiable: Collection[str]
    narrow: frozenset[str] = frozenset()
    carried: frozenset[str] = frozenset()
    optional: frozenset[str] = frozenset()

    def inputs(self, sizes: Sizes, generator: Generator | None = None, without: Collection[str] = ()) -> Inputs:
        """Random inputs, from torch's own generator if none is given."""
        return {name: x for name, x in self.make(sizes, generator).items() if name not in without}

    def wanting(self, inputs: Mapping[str, Tensor], dtype: torch.dtype | None = None) -> Inputs:
        """Copies of the inputs, floating ones in `dtype`, that ask for every gradient there is."""
        return {
            name: x.detach()
            .clone()
            .to(dtype if x.is_floating_point() else None)
            .requires_grad_(name in self.differentiable)
            for name, x in inputs.items()
        }

    def gradients(self, outputs: Sequence[Tensor], inputs: Inputs, directions: Sequence[Tensor]) -> Inputs:
        """The gradient of sum(output * direction) with respect to each differentiable input."""
        names = [name for name in inputs if name in self.differentiable]
        total = sum((out.double() * d.double()).sum() for out, d in zip(outputs, directions, strict=True))
        assert isinstance(total, Tensor)
        return dict(zip(names, torch.autograd.grad(total, [inputs[name] for name in names]), strict=True))


def _called(op: str, **options: Any) -> Callable[[Any, Inputs], tuple[Tensor, ...]]:
    """A call of `op` by name, whose one result or several become a tuple."""

    def call(ops: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        found = getattr(ops, op)(**inputs, **options)
        return (found,) if isinstance(found, Tensor) else tuple(found)

    return call


def _scan(s: Sizes, g: Generator | None) -> Inputs:
    return {
        "u_BLE": torch.randn(s.B, s.L, s.E, generator=g),
        "delta_BLE": torch.randn(s.B, s.L, s.E, generator=g),
        "A_EN": -torch.rand(s.E, s.N, generator=g) * 3 - 0.1,
        "B_BLN": torch.randn(s.B, s.L, s.N, generator=g),
        "C_BLN": torch.randn(s.B, s.L, s.N, generator=g),
        "skip_E": torch.randn(s.E, generator=g),
        "z_BLE": torch.randn(s.B, s.L, s.E, generator=g),
        "delta_bias_E": torch.randn(s.E, generator=g),
        "initial_state_BEN": torch.randn(s.B, s.E, s.N, generator=g),
        "reset_BL": torch.rand(s.B, s.L, generator=g) < 0.05,
    }


def _conv(s: Sizes, g: Generator | None) -> Inputs:
    history = {"initial_state_BKE": torch.randn(s.B, s.K - 1, s.E, generator=g)} if s.K > 1 else {}
    return {
        "u_BLE": torch.randn(s.B, s.L, s.E, generator=g),
        "weight_E1K": torch.randn(s.E, 1, s.K, generator=g),
        "bias_E": torch.randn(s.E, generator=g),
        **history,
        "reset_BL": torch.rand(s.B, s.L, generator=g) < 0.1,
    }


def _norm(s: Sizes, g: Generator | None) -> Inputs:
    return {"x_BLD": torch.randn(s.B, s.L, s.D, generator=g), "weight_D": torch.randn(s.D, generator=g)}


def _add_norm(s: Sizes, g: Generator | None) -> Inputs:
    return {**_norm(s, g), "residual_BLD": torch.randn(s.B, s.L, s.D, generator=g)}


def _loss(classes: str) -> Callable[[Sizes, Generator | None], Inputs]:
    def make(s: Sizes, g: Generator | None) -> Inputs:
        return {
            "z_TD": torch.randn(s.T, s.D, generator=g),
            classes: torch.randn(s.V, s.D, generator=g),
            "targets_T": torch.randint(-1, s.V, (s.T,), generator=g),
        }

    return make


def _sampled(
    classes: str, chances: str = "log_chance_S", **more: Tensor
) -> Callable[[Sizes, Generator | None], Inputs]:
    def make(s: Sizes, g: Generator | None) -> Inputs:
        sample_S = torch.randperm(s.V, generator=g)[: s.S].sort().values
        log_chance_S = -torch.rand(len(sample_S), generator=g)
        return {**_loss(classes)(s, g), **more, "sample_S": sample_S, chances: log_chance_S}

    return make


def _product(s: Sizes, g: Generator | None) -> Inputs:
    return {"x_TI": torch.randn(min(s.T, 8), s.D, generator=g), "w_OI": torch.randn(s.V, s.D, generator=g)}


def _judged(s: Sizes, g: Generator | None) -> Inputs:
    scores_TC, targets_T = torch.randn(s.T, s.V, generator=g), torch.randint(0, s.V, (s.T,), generator=g)
    own_T = scores_TC.gather(1, targets_T[:, None])[:, 0]
    reserved_R = torch.arange(min(2, s.V))
    return {"scores_TC": scores_TC, "own_T": own_T, "targets_T": targets_T, "reserved_R": reserved_R}


def block_weights(s: Sizes, compact: bool = False, generator: Generator | None = None) -> Inputs:
    """The tensors of BlockWeights by name, matrices scaled so that activations stay of size 1; compact: D = E."""
    width = s.E if compact else s.D

    def randn(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    in_proj = {} if compact else {"in_proj_WD": randn(2 * s.E, width) * width**-0.5}
    return {
        "norm_D": randn(width),
        **in_proj,
        "conv_weight_E1K": randn(s.E, 1, s.K),
        "conv_bias_E": randn(s.E),
        "x_proj_SE": randn(s.R + 2 * s.N, s.E) * s.E**-0.5,
        "dt_proj_ER": randn(s.E, s.R) * s.R**-0.5,
        "dt_bias_E": randn(s.E),
        "A_log_EN": torch.rand(s.E, s.N, generator=generator),
        "D_E": randn(s.E),
        "out_proj_DE": randn(width, s.E) * s.E**-0.5,
    }


def block_state(s: Sizes, generator: Generator | None = None) -> Inputs:
    """The tensors of BlockState by name."""
    return {
        "conv_BKE": torch.randn(s.B, s.K - 1, s.E, generator=generator),
        "ssm_BEN": torch.randn(s.B, s.E, s.N, generator=generator),
    }


def as_weights(inputs: Mapping[str, Tensor]) -> BlockWeights:
    """The BlockWeights among these tensors."""
    return BlockWeights(**{name: inputs.get(name) for name in BlockWeights._fields})  # type: ignore[arg-type]


def _block(compact: bool) -> Callable[[Sizes, Generator | None], Inputs]:
    def make(s: Sizes, g: Generator | None) -> Inputs:
        return {
            "x_BLD": torch.randn(s.B, s.L, s.E if compact else s.D, generator=g),
            **block_weights(s, compact, g),
            **block_state(s, g),
            "reset_BL": torch.rand(s.B, s.L, generator=g) < 0.1,
        }

    return make


def _call_block(ops: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """x and, where a state is given, the last one."""
    state = BlockState(inputs["conv_BKE"], inputs["ssm_BEN"]) if "ssm_BEN" in inputs else None
    out = ops.mamba_block(
        inputs["x_BLD"],
        as_weights(inputs),
        state=state,
        return_state=state is not None,
        reset_BL=inputs.get("reset_BL"),
    )
    return (out.x_BLD, *(out.state or ()))


def _call_step(ops: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """Three positions, one after another; the states are the op's to change, so it gets copies."""
    state = BlockState(inputs["conv_BKE"].clone(), inputs["ssm_BEN"].clone())
    x_BLD, weights = inputs["x_BLD"], as_weights(inputs)
    outs = [ops.mamba_step(x_BLD[:, t % x_BLD.shape[1]], weights, state) for t in range(3)]
    return (*outs, *state)


def _call_judge(ops: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """In two blocks; up to ten of the best. The one optional input comes with `own_T`."""
    scores_TC, rest = inputs["scores_TC"], {name: x for name, x in inputs.items() if name != "scores_TC"}
    half, width = (scores_TC.shape[-1] + 1) // 2, scores_TC.shape[-1]
    judging = Judging.empty(len(scores_TC), min(10, width), scores_TC.dtype)
    for start, stop in ((0, half), (half, width)):
        if start < stop or start == 0:
            ops.judge_block(scores_TC[..., start:stop], start, judging, factor=3.0, **rest)
    return tuple(x for x in judging if x is not None)


def _call_grouped(ops: Any, inputs: Inputs) -> tuple[Tensor, ...]:
    """Two groups of the tokens, the first in two runs, which share the one sample."""
    rest = {name: x for name, x in inputs.items() if name not in ("sample_S", "log_chance_S")}
    sample_S, log_chance_S, targets_T = inputs["sample_S"], inputs["log_chance_S"], inputs["targets_T"]
    tokens = len(targets_T) if targets_T.is_complex() else int((targets_T >= 0).sum())
    first, chances_2S = tokens // 2, torch.stack([log_chance_S, log_chance_S.flip(0)])
    samples = [
        Sample(sample_S, chances_2S, (first // 2, first - first // 2)),
        Sample(sample_S, chances_2S[:1], (tokens - first,)),
    ]
    return (ops.grouped_prototype_loss(**rest, samples=samples),)


_CARRIED = frozenset({"initial_state_BEN", "initial_state_BKE", "conv_BKE", "ssm_BEN", "reset_BL"})
_BLOCK = ("x_BLD", *BlockWeights._fields, *BlockState._fields)

CASES = {
    "selective_scan": Case(
        _scan,
        _called("selective_scan", delta_softplus=True, return_last_state=True),
        ("u_BLE", "delta_BLE", "A_EN", "B_BLN", "C_BLN", "skip_E", "z_BLE", "delta_bias_E", "initial_state_BEN"),
        narrow=frozenset({"u_BLE", "delta_BLE", "B_BLN", "C_BLN", "z_BLE"}),
        carried=_CARRIED,
        optional=frozenset({"skip_E", "z_BLE", "delta_bias_E"}) | _CARRIED,
    ),
    "causal_conv": Case(
        _conv,
        _called("causal_conv", return_last_state=True),
        ("u_BLE", "weight_E1K", "bias_E", "initial_state_BKE"),
        narrow=frozenset({"u_BLE"}),
        carried=_CARRIED,
        optional=frozenset({"bias_E"}) | _CARRIED,
    ),
    "rms_norm": Case(_norm, _called("rms_norm"), ("x_BLD", "weight_D")),
    "add_rms_norm": Case(_add_norm, _called("add_rms_norm"), ("x_BLD", "weight_D", "residual_BLD")),
    "prototype_loss": Case(_loss("prototypes_VD"), _called("prototype_loss"), ("z_TD", "prototypes_VD")),
    "softmax_loss": Case(_loss("weight_VD"), _called("softmax_loss"), ("z_TD", "weight_VD")),
    "separated_prototype_loss": Case(
        _sampled("prototypes_VD", log_scale=torch.tensor(1.7)),
        _called("separated_prototype_loss"),
        ("z_TD", "prototypes_VD", "log_scale"),
    ),
    "judge_block": Case(_judged, _call_judge, (), optional=frozenset({"reserved_R"})),
    "product": Case(_product, _called("product"), ()),
    "mamba_block": Case(_block(False), _call_block, _BLOCK, carried=_CARRIED, optional=_CARRIED),
    "compact_block": Case(_block(True), _call_block, _BLOCK, carried=_CARRIED, optional=_CARRIED),
    "mamba_step": Case(_block(False), _call_step, (), carried=_CARRIED),
    "sampled_softmax_loss": Case(
        _sampled("weight_VD", "log_chance"), _called("sampled_softmax_loss"), ("z_TD", "weight_VD")
    ),
    "grouped_prototype_loss": Case(
        _sampled("prototypes_VD", log_scale=torch.tensor(1.7)), _call_grouped, ("z_TD", "prototypes_VD", "log_scale")
    ),
}
