"""The Mamba block (Gu & Dao 2023, arXiv 2312.00752) and the compact block, under published parameter names and shapes.

Written module by module, so that each can be wrapped and hooked; where none is, one kernel, `kernels.mamba_block`, runs
the whole block.
"""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.config import NORM_EPS, InnerFields, ModelConfig, StateSpaceFields
from protomamba.kernels import BlockState, BlockWeights
from protomamba.model.mixers.base import PLAIN_CALL, ForwardContext, Mixer, MixerOutput, State, Stepper, mixer
from protomamba.model.registry import settings

DT_MIN, DT_MAX = 1e-3, 1e-1


class CausalConv1d(nn.Conv1d):
    """nn.Conv1d's parameters, depthwise (E, 1, K), for sequences as they lie: (B, L, E), causal, with SiLU after it."""

    def __init__(self, d_inner: int, d_conv: int) -> None:
        super().__init__(d_inner, d_inner, d_conv, groups=d_inner)

    def forward(  # type: ignore[override]
        self,
        u_BLE: Tensor,
        state_BKE: Tensor | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """silu(conv(u)), (B, L, E), from the last K - 1 inputs before u (None = zeros); with `return_state` also the
        last K - 1 inputs."""
        return kernels.causal_conv(u_BLE, self.weight, self.bias, state_BKE, return_state, reset_BL)


class ScanMixer(Mixer):
    """What both blocks share: convolution, projections, the scan's parameters, and their published initialisation."""

    class Config(StateSpaceFields):
        """d_state and d_conv."""

    FUSED_PARTS: ClassVar = {
        "conv1d": (CausalConv1d, True),
        "x_proj": (nn.Linear, False),
        "dt_proj": (nn.Linear, True),
        "out_proj": (nn.Linear, False),
    }

    options: Config

    def __init__(self, config: ModelConfig, d_inner: int, dt_rank: int) -> None:
        super().__init__(config)
        d_state = self.options.d_state
        self.conv1d = CausalConv1d(d_inner, self.options.d_conv)
        self.x_proj = nn.Linear(d_inner, dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1, d_state + 1, dtype=torch.float32).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, config.d_model, bias=False)
        with torch.no_grad():
            nn.init.uniform_(self.dt_proj.weight, -(dt_rank**-0.5), dt_rank**-0.5)
            dt_E = torch.empty(d_inner).uniform_(math.log(DT_MIN), math.log(DT_MAX)).exp()
            self.dt_proj.bias.copy_(dt_E + torch.log(-torch.expm1(-dt_E)))  # softplus(bias) = dt

    def forward(self, x_BLD: Tensor, ctx: ForwardContext = PLAIN_CALL) -> MixerOutput:
        conv_BKE, ssm_BEN = BlockState(*ctx.state) if ctx.state is not None else (None, None)
        with products_in(ctx.precision):
            u_BLE, z_BLE = self.project_in(x_BLD)
        u_BLE, conv_BKE = self._convolve(u_BLE, conv_BKE, ctx)
        if ctx.activation_hook is not None:
            ctx.activation_hook(u_BLE.detach())
        with products_in(ctx.precision):
            projected_BLS = self.x_proj(u_BLE)
        n_state = self.A_log.shape[1]
        dt_BLR, B_BLN, C_BLN = projected_BLS.split([projected_BLS.shape[-1] - 2 * n_state, n_state, n_state], -1)
        delta_BLE = self.dt_proj(dt_BLR.to(x_BLD.dtype))  # with its bias, which is exact in no narrower dtype
        A_EN = -torch.exp(self.A_log)
        y_BLE, ssm_BEN = cast(
            tuple[Tensor, Tensor],
            kernels.selective_scan(
                u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, self.D, z_BLE, None, True, ssm_BEN, True, ctx.reset_BL
            ),
        )
        with products_in(ctx.precision):
            y_BLD = self.out_proj(y_BLE)
        return MixerOutput(y_BLD.to(x_BLD.dtype), (conv_BKE, ssm_BEN) if ctx.return_state else None)

    def project_in(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        """u (B, L, E) for the convolution and the gate z, None without one."""
        return x_BLD, None

    def _convolve(self, u_BLE: Tensor, state_BKE: Tensor | None, ctx: ForwardContext) -> tuple[Tensor, Tensor]:
        try:
            convolved_BLE, new_state_BKE = self.conv1d(u_BLE, state_BKE, ctx.reset_BL, True)
        except TypeError as error:
            if isinstance(self.conv1d, CausalConv1d):
                raise
            raise TypeError(
                f"conv1d is {type(self.conv1d).__name__}, which keeps no state and ignores document starts: expected a "
                "CausalConv1d of protomamba.model.mixers.mamba, or a module called like one, conv1d(u_BLE, state_BKE, "
                "reset_BL, return_state), that returns the activated output and the state"
            ) from error
        return convolved_BLE, new_state_BKE

    def local_weight(self) -> nn.Parameter | None:
        """D, the skip weight (E,); None where something else is computed in its place."""
        return self.D if isinstance(self.D, nn.Parameter) else None

    def fused_block(self, x_BLD: Tensor, norm_weight_D: Tensor, ctx: ForwardContext) -> MixerOutput:
        output = kernels.mamba_block(
            x_BLD,
            self._weights(norm_weight_D),
            eps=NORM_EPS,
            precision=ctx.precision,
            state=BlockState(*ctx.state) if ctx.state is not None else None,
            return_state=ctx.return_state,
            reset_BL=ctx.reset_BL,
            want_u=ctx.activation_hook is not None,
            recompute=ctx.recompute,
            activations=ctx.activations,
        )
        if ctx.activation_hook is not None:
            assert output.u_BLE is not None
            ctx.activation_hook(output.u_BLE)
        return MixerOutput(output.x_BLD, output.state)

    def fused_stepper(self, norm_weight_D: Tensor, state: State) -> Stepper:
        return kernels.MambaStepper(self._weights(norm_weight_D), BlockState(*state), eps=NORM_EPS)

    def empty_state(self, x_BD: Tensor) -> BlockState:
        (d_inner, _, taps), n_state = self.conv1d.weight.shape, self.A_log.shape[1]
        dtype = kernels.reference.compute_dtype(x_BD)
        sizes = (len(x_BD), taps - 1, d_inner), (len(x_BD), d_inner, n_state)
        return BlockState(*(x_BD.new_zeros(size, dtype=dtype) for size in sizes))

    def input_matrix(self) -> Tensor | None:
        """The weight of in_proj (2E, D); None without one."""
        return None

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


def products_in(precision: str) -> AbstractContextManager[object]:
    """Within it modules compute their matrix products in bf16, or, with fp32, as they would anyway."""
    return torch.autocast("cpu", dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


@mixer("mamba")
class Mamba(ScanMixer):
    """in_proj -> causal convolution and SiLU -> selective scan, gated -> out_proj; E = expand * D."""

    class Config(ScanMixer.Config, InnerFields):
        """d_state, d_conv, expand and dt_rank."""

    fused = True
    FUSED_PARTS: ClassVar = {**ScanMixer.FUSED_PARTS, "in_proj": (nn.Linear, False)}

    options: Config

    def __init__(self, config: ModelConfig) -> None:
        sizes = settings(type(self), config)
        assert isinstance(sizes, Mamba.Config)
        d_inner = sizes.expand * config.d_model
        super().__init__(config, d_inner, sizes.dt_rank or math.ceil(config.d_model / 16))
        self.in_proj = nn.Linear(config.d_model, 2 * d_inner, bias=False)

    def project_in(self, x_BLD: Tensor) -> tuple[Tensor, Tensor | None]:
        u_BLE, z_BLE = self.in_proj(x_BLD).chunk(2, dim=-1)
        return u_BLE, z_BLE

    def input_matrix(self) -> Tensor:
        return self.in_proj.weight


@mixer("compact")
class Compact(ScanMixer):
    """The reference crate's block: convolution and SiLU -> selective scan -> out_proj; E = D, no gate, dt of rank 1."""

    fused = True

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, config.d_model, dt_rank=1)
