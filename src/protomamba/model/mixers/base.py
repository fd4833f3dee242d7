"""What a layer of the residual stack is: `x = x + layer(norm(x))`, for our layers and for a user's own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.config import NORM_EPS
from protomamba.errors import ConfigError

State = tuple[Tensor, ...]
ActivationHook = Callable[[Tensor], None]
Stepper = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ForwardContext:
    """How one forward pass runs: the same for every layer of it."""

    reset_BL: Tensor | None = None  # True where a document starts: no state crosses into that position
    return_state: bool = False
    precision: str = "fp32"  # or bf16: matrix products in bf16


class ResidualLayer(nn.Module, ABC):
    """A layer together with the norm before it and the residual around it. Constructed as `Class(config)`."""

    @abstractmethod
    def residual(
        self,
        x_BLD: Tensor,
        norm_weight_D: Tensor,
        state: State | None,
        ctx: ForwardContext,
        activation_hook: ActivationHook | None,
    ) -> tuple[Tensor, State | None]:
        """x + layer(norm(x)), (B, L, D), from `state` (None = from nothing), and the state after the last position.

        activation_hook: receives the activation (B, L, E) that `local_weight` multiplies, detached.
        """

    @abstractmethod
    def residual_step(self, x_BD: Tensor, norm_weight_D: Tensor, state: State | None) -> tuple[Tensor, State]:
        """`residual` for one token (B, D), without gradient. Takes `state` over: it may be changed in place."""

    def stepper(self, norm_weight_D: Tensor, state: State | None) -> Stepper:
        """`residual_step` for one token after another, from `state`; the parameters stay as they are meanwhile."""
        held = state

        def step(x_BD: Tensor) -> Tensor:
            nonlocal held
            x_BD, held = self.residual_step(x_BD, norm_weight_D, held)
            return x_BD

        return step

    def output_parameters(self) -> list[nn.Parameter]:
        """The parameters that, all zero, make the output exactly zero: a new layer of a grown model starts so."""
        out_proj = getattr(self, "out_proj", None)
        if not isinstance(out_proj, nn.Linear):
            raise ConfigError(f"layer {type(self).__name__} has no out_proj to grow from; define output_parameters()")
        return list(out_proj.parameters())

    def local_weight(self) -> nn.Parameter | None:
        """The vector (E,) that Forward-Forward updates train by a local signal; None where a layer has none."""
        return None


class Layer(ResidualLayer):
    """Base of a user's layer: give `forward`, and `output_parameters` if there is no `out_proj`."""

    @abstractmethod
    def forward(self, x_BLD: Tensor, state: State | None, reset_BL: Tensor | None) -> tuple[Tensor, State]:
        """Output (B, L, D) for the normalised input (B, L, D), from `state` (None = from nothing), and the state after
        the last position. Where `reset_BL` (B, L) is true, nothing earlier may be seen."""

    def residual(
        self,
        x_BLD: Tensor,
        norm_weight_D: Tensor,
        state: State | None,
        ctx: ForwardContext,
        activation_hook: ActivationHook | None,
    ) -> tuple[Tensor, State]:
        y_BLD, new_state = self(kernels.rms_norm(x_BLD, norm_weight_D, NORM_EPS), state, ctx.reset_BL)
        return x_BLD + y_BLD, new_state

    def residual_step(self, x_BD: Tensor, norm_weight_D: Tensor, state: State | None) -> tuple[Tensor, State]:
        y_BLD, new_state = self(kernels.rms_norm(x_BD[:, None], norm_weight_D, NORM_EPS), state, None)
        return x_BD + y_BLD[:, 0], new_state


class Norm(nn.Module):
    """The weight of an RMSNorm over D: x / sqrt(mean(x^2) + 1e-5) * weight."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d_model))

    def forward(self, x_BLD: Tensor) -> Tensor:
        return kernels.rms_norm(x_BLD, self.weight, NORM_EPS)


class Block(nn.Module):
    """One step of the stack: a norm and a layer, under the names of published Mamba checkpoints."""

    def __init__(self, layer: ResidualLayer, d_model: int) -> None:
        super().__init__()
        self.norm = Norm(d_model)
        self.mixer: ResidualLayer = layer

    def forward(
        self, x_BLD: Tensor, state: State | None, ctx: ForwardContext, activation_hook: ActivationHook | None = None
    ) -> tuple[Tensor, State | None]:
        """x (B, L, D) with the layer's output added, and its state."""
        return self.mixer.residual(x_BLD, self.norm.weight, state, ctx, activation_hook)

    def step(self, x_BD: Tensor, state: State | None) -> tuple[Tensor, State]:
        """`forward` for one token."""
        return self.mixer.residual_step(x_BD, self.norm.weight, state)

    def stepper(self, state: State | None) -> Stepper:
        """`step` for one token after another, from `state`."""
        return self.mixer.stepper(self.norm.weight, state)

    def zero_init_output(self) -> None:
        """Zero what makes the layer's output, so that the block is the identity, to the bit."""
        with torch.no_grad():
            for parameter in self.mixer.output_parameters():
                parameter.zero_()


def scale_output_init(layer: ResidualLayer, n_layer: int) -> None:
    """Scale a fresh layer's output matrices by 1/sqrt(2 * layers), as GPT-2 and Mamba do for residual stacks."""
    with torch.no_grad():
        for parameter in layer.output_parameters():
            parameter.div_((2 * max(1, n_layer)) ** 0.5)
