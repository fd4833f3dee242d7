"""The interface of a mixer, in `x = x + mixer(norm(x))`, for our layers and for user-defined ones.

It is a module like any other: it is called, so that hooks fire and adapters act.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from protomamba import kernels
from protomamba.config import NORM_EPS
from protomamba.errors import ConfigError
from protomamba.model.plain import any_global_hook, is_plain, passes_through, why_not_plain
from protomamba.model.registry import Part, Registry

State = tuple[Tensor, ...]
ActivationHook = Callable[[Tensor], None]
Stepper = Callable[[Tensor], Tensor]


class MixerOutput(NamedTuple):
    """y (B, L, D), and the state after the last position if requested."""

    y_BLD: Tensor
    state: State | None = None


@dataclass(frozen=True)
class ForwardContext:
    """How one call of a mixer or block runs. Everything has a default: `mixer(x)` starts without a state."""

    state: State | None = None  # what an earlier call returned: the sequence continues from there
    reset_BL: Tensor | None = None  # True where a document starts: nothing crosses into that position
    return_state: bool = False
    precision: str = "fp32"  # or bf16: matrix products in bf16
    activation_hook: ActivationHook | None = None  # receives what `local_weight` multiplies (B, L, E), detached
    recompute: str = "cheap"  # what the backward pass recomputes instead of keeping it: none, cheap or blocks
    activations: str = "fp32"  # or bf16: what a fused block keeps for the backward pass is kept in bf16


PLAIN_CALL = ForwardContext()


class Mixer(Part, ABC):
    """Base of every layer's mixer, including your own: define `forward`; without `out_proj` also `output_parameters`.

    Use a mixer of your own by name: `--layer package.module:Class`. Constructed as `Class(config)`.
    """

    FIELD = "layer_options"

    # Whether `fused_block` stands for norm, mixer and residual together. Said by a class for itself, never inherited:
    # a class derived from it may do something else.
    fused: ClassVar[bool] = False
    # The modules that it does not call: the class each must have for that, and whether with a bias.
    FUSED_PARTS: ClassVar[Mapping[str, tuple[type[nn.Module], bool]]] = {}

    @abstractmethod
    def forward(self, x_BLD: Tensor, ctx: ForwardContext = PLAIN_CALL) -> MixerOutput:
        """The output (B, L, D) for the normalised input (B, L, D), from `ctx.state` (None = from nothing), and with
        `ctx.return_state` the state after the last position: tensors with the batch first."""

    def output_parameters(self) -> list[nn.Parameter]:
        """The parameters that, all zero, make the output exactly zero: a new layer of a grown model starts so."""
        out_proj = getattr(self, "out_proj", None)
        if not isinstance(out_proj, nn.Linear):
            raise ConfigError(f"layer {type(self).__name__} has no out_proj to grow from; define output_parameters()")
        return list(out_proj.parameters())

    def local_weight(self) -> nn.Parameter | None:
        """The vector (E,) that Forward-Forward updates train by a local signal; None where a layer has none."""
        return None

    def stack_states(self, states: Sequence[State]) -> State:
        """The states of several sequences combined into the state of a batch."""
        return tuple(torch.cat(parts) for parts in zip(*states, strict=True))

    def fused_block(self, x_BLD: Tensor, norm_weight_D: Tensor, ctx: ForwardContext) -> MixerOutput:
        """x + mixer(norm(x)), (B, L, D), by one kernel: what a class that says `fused` defines."""
        raise NotImplementedError

    def fused_stepper(self, norm_weight_D: Tensor, state: State) -> Stepper:
        """`fused_block` for one token after another (B, D), without gradient; moves the state on in place."""
        raise NotImplementedError

    def empty_state(self, x_BD: Tensor) -> State:
        """The state before the first token, for a batch of that size and dtype: where `fused_stepper` starts."""
        raise NotImplementedError


mixer: Registry[Mixer] = Registry("layer", Mixer)  # type: ignore[type-abstract]


class Norm(nn.Module):
    """The weight of an RMSNorm over D: x / sqrt(mean(x^2) + 1e-5) * weight."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return kernels.rms_norm(x_BLD, self.weight, NORM_EPS)


class Block(nn.Module):
    """One step of the stack: a norm, a mixer and dropout, under the names of published Mamba checkpoints."""

    def __init__(self, mixer: Mixer, d_model: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = Norm(d_model)
        self.mixer: Mixer = mixer
        self.dropout = nn.Dropout(dropout)

    def forward(self, x_BLD: Tensor, ctx: ForwardContext = PLAIN_CALL) -> MixerOutput:
        """x (B, L, D) with the mixer's output added, and its state.

        By one kernel where nothing inside is wrapped, hooked, replaced or derived; else module by module.
        """
        if self.is_fused():
            output = self.mixer.fused_block(x_BLD, self.norm.weight, ctx)
            if passes_through(self.dropout):
                return output
            y_BLD, state = output.y_BLD - x_BLD, output.state
        else:
            y_BLD, state = self._unfused(x_BLD, ctx)
        return MixerOutput(x_BLD + self.dropout(y_BLD), state)

    def _unfused(self, x_BLD: Tensor, ctx: ForwardContext) -> MixerOutput:
        # A hook would be called again: with one everything is kept.
        if ctx.recompute == "blocks" and ctx.activation_hook is None and torch.is_grad_enabled():
            made: MixerOutput = checkpoint(self._by_modules, x_BLD, ctx, use_reentrant=False)
            return made
        return self._by_modules(x_BLD, ctx)

    def _by_modules(self, x_BLD: Tensor, ctx: ForwardContext) -> MixerOutput:
        if not isinstance(self.mixer, Mixer):
            raise TypeError(
                f"the mixer of a layer is {type(self.mixer).__name__}: expected a Mixer, whose forward(x_BLD, ctx) "
                "returns a MixerOutput; wrap its inner projections, or derive a class from protomamba.Mixer"
            )
        return self.mixer(self.norm(x_BLD), ctx)  # type: ignore[no-any-return]

    def is_fused(self) -> bool:
        """Whether one kernel runs the block."""
        mixer, inside = self.mixer, self.mixer._modules
        return (
            vars(type(mixer)).get("fused", False)
            and is_plain(self.norm, Norm)
            and is_plain(mixer, type(mixer))
            and all(_stands_in(inside[name], kind, bias) for name, (kind, bias) in mixer.FUSED_PARTS.items())
            and not any_global_hook()
        )

    def unfused_reason(self) -> str | None:
        """Why a block whose mixer derives from one with a kernel does not run by it: which module, and what it is.

        None for a block that runs fused, and for one that never does.
        """
        mixer = self.mixer
        fused = next((each for each in type(mixer).__mro__ if vars(each).get("fused", False)), None)
        if fused is None or self.is_fused():
            return None
        if not is_plain(self.norm, Norm):
            return f"norm {why_not_plain(self.norm, Norm)}"
        if not is_plain(mixer, fused):
            return f"mixer {why_not_plain(mixer, fused)}"
        for name, (kind, bias) in mixer.FUSED_PARTS.items():
            part = getattr(mixer, name)
            if not is_plain(part, kind):
                return f"mixer.{name} {why_not_plain(part, kind)}"
            if not _stands_in(part, kind, bias):
                return f"mixer.{name} has {'no' if bias else 'a'} bias"
        return "a global module hook is registered"

    @torch.no_grad()
    def decode_step(self, x_BD: Tensor, state: State | None) -> MixerOutput:
        """`forward` for one token (B, D). Takes the state over: it may be changed in place."""
        if self._steps_fused():
            held = state if state is not None else self.mixer.empty_state(x_BD)
            return MixerOutput(self.mixer.fused_stepper(self.norm.weight, held)(x_BD), held)
        y_B1D, new_state = self(x_BD[:, None], ForwardContext(state, return_state=True))
        return MixerOutput(y_B1D[:, 0], new_state)

    def stepper(self, state: State | None) -> Stepper:
        """`decode_step` for one token after another, from `state`; the parameters stay as they are meanwhile."""
        if state is not None and self._steps_fused():
            return self.mixer.fused_stepper(self.norm.weight, state)
        held = state

        def step(x_BD: Tensor) -> Tensor:
            nonlocal held
            x_BD, held = self.decode_step(x_BD, held)
            return x_BD

        return step

    def _steps_fused(self) -> bool:
        return is_plain(self, Block) and self.is_fused() and passes_through(self.dropout)

    def zero_init_output(self) -> None:
        """Zero what makes the mixer's output, so that the block is the identity, to the bit."""
        with torch.no_grad():
            for parameter in self.mixer.output_parameters():
                parameter.zero_()


def _stands_in(module: nn.Module | None, kind: type[nn.Module], bias: bool) -> bool:
    """Whether a kernel that knows this kind of module, with or without a bias, may stand for it."""
    return module is not None and is_plain(module, kind) and (module._parameters["bias"] is not None) == bias


def scale_output_init(layer: Mixer, n_layer: int) -> None:
    """Scale a fresh layer's output matrices by 1/sqrt(2 * layers), as GPT-2 and Mamba do for residual stacks."""
    with torch.no_grad():
        for parameter in layer.output_parameters():
            parameter.div_((2 * max(1, n_layer)) ** 0.5)
