"""The Mamba block (Gu & Dao 2023, arXiv 2312.00752) and the compact block, under published parameter names and shapes.

A layer here holds parameters only; the mathematics is one kernel, `kernels.mamba_block`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.config import NORM_EPS, ModelConfig
from protomamba.kernels import BlockState, BlockWeights
from protomamba.model.mixers.base import ActivationHook, ForwardContext, ResidualLayer, State, Stepper

DT_MIN, DT_MAX = 1e-3, 1e-1


class ScanLayer(ResidualLayer):
    """What both blocks share: convolution, projections, the scan's parameters, and their published initialisation."""

    def __init__(self, d_model: int, d_inner: int, d_state: int, d_conv: int, dt_rank: int) -> None:
        super().__init__()
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
            dt_E = torch.empty(d_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
            self.dt_proj.bias.copy_(dt_E + torch.log(-torch.expm1(-dt_E)))  # softplus(bias) = dt

    def residual(
        self,
        x_BLD: Tensor,
        norm_weight_D: Tensor,
        state: State | None,
        ctx: ForwardContext,
        activation_hook: ActivationHook | None,
    ) -> tuple[Tensor, State | None]:
        output = kernels.mamba_block(
            x_BLD,
            self._weights(norm_weight_D),
            eps=NORM_EPS,
            precision=ctx.precision,
            state=BlockState(*state) if state is not None else None,
            return_state=ctx.return_state,
            reset_BL=ctx.reset_BL,
            want_u=activation_hook is not None,
        )
        if activation_hook is not None:
            assert output.u_BLE is not None
            activation_hook(output.u_BLE)
        return output.x_BLD, output.state

    def residual_step(self, x_BD: Tensor, norm_weight_D: Tensor, state: State | None) -> tuple[Tensor, State]:
        held = BlockState(*state) if state is not None else self._empty_state(x_BD)
        return kernels.mamba_step(x_BD, self._weights(norm_weight_D), held, eps=NORM_EPS), held

    def stepper(self, norm_weight_D: Tensor, state: State | None) -> Stepper:
        if state is None or type(self) not in LAYERS.values():  # a class derived from ours may step in its own way
            return super().stepper(norm_weight_D, state)
        return kernels.MambaStepper(self._weights(norm_weight_D), BlockState(*state), eps=NORM_EPS)

    def local_weight(self) -> nn.Parameter:
        """D, the skip weight (E,)."""
        return self.D

    def input_matrix(self) -> Tensor | None:
        """The weight of in_proj (2E, D); None without one."""
        return None

    def _empty_state(self, x_BD: Tensor) -> BlockState:
        (d_inner, _, taps), n_state = self.conv1d.weight.shape, self.A_log.shape[1]
        dtype = kernels.reference.compute_dtype(x_BD)
        sizes = (len(x_BD), taps - 1, d_inner), (len(x_BD), d_inner, n_state)
        return BlockState(*(x_BD.new_zeros(size, dtype=dtype) for size in sizes))

    def _weights(self, norm_weight_D: Tensor) -> BlockWeights:
        assert self.conv1d.bias is not None
        return BlockWeights(
            norm_D=norm_weight_D,
            in_proj_WD=self.input_matrix(),
            conv_weight_E1K=self.conv1d.weight,
            conv_bias_E=self.conv1d.bias,
            x_proj_SE=self.x_proj.weight,
            dt_proj_ER=self.dt_proj.weight,
            dt_bias_E=self.dt_proj.bias,
            A_log_EN=self.A_log,
            D_E=self.D,
            out_proj_DE=self.out_proj.weight,
        )


class MambaLayer(ScanLayer):
    """in_proj -> causal convolution and SiLU -> selective scan, gated -> out_proj; E = expand * D."""

    def __init__(self, config: ModelConfig) -> None:
        d_inner = config.expand * config.d_model
        super().__init__(config.d_model, d_inner, config.d_state, config.d_conv, config.time_step_rank)
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)

    def input_matrix(self) -> Tensor:
        return self.in_proj.weight


class CompactLayer(ScanLayer):
    """The reference crate's block: convolution and SiLU -> selective scan -> out_proj; E = D, no gate, dt of rank 1."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config.d_model, config.d_model, config.d_state, config.d_conv, dt_rank=1)


LAYERS: dict[str, type[ResidualLayer]] = {"mamba": MambaLayer, "compact": CompactLayer}
