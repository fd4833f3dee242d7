"""mamba_step: one token of a block in one native call; decode_step: one token of a whole model. Twins: `reference`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.mamba_block import check_block_shapes, mamba_block
from protomamba.kernels.matmul import FEW_ROWS
from protomamba.kernels.native import Library
from protomamba.kernels.reference import BlockState, BlockWeights, LogitProjection


def mamba_step(x_BD: Tensor, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> Tensor:
    """One token of `mamba_block` for a batch: returns x (B, D) and updates `state` in place. No gradient.

    Native for float32 x, weights and state. ValueError for shapes that do not fit. For many tokens: `MambaStepper`.
    """
    return MambaStepper(weights, state, eps=eps)(x_BD)


class MambaStepper:
    """`mamba_step` for one token after another: from x (B, D) to x (B, D), moving `state` on in place.

    What does not change between tokens is done once, so the weights must stay as they are meanwhile. ValueError for
    shapes that do not fit.
    """

    def __init__(self, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> None:
        self._weights, self._state, self._eps = weights, state, eps
        sizes = check_block_shapes("mamba_step", weights, state)
        self.batch, self._width = sizes["B"], sizes["D"]
        self._library = native.select("mamba_step", state.ssm_BEN, (torch.float32,))
        tensors = (*weights, *state)
        simple = all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in tensors)
        self.native = self._library is not None and simple and self.batch <= FEW_ROWS
        if not self.native:
            return
        taps_KE = weights.conv_weight_E1K.detach()[:, 0].t().contiguous()
        A_EN = -torch.exp(weights.A_log_EN.detach())
        w = weights
        self.fields: Mapping[str, Any] = {letter: sizes[letter] for letter in "BDENRK"} | {
            "eps": eps, "norm": w.norm_D, "in_proj": w.in_proj_WD, "taps": taps_KE, "conv_bias": w.conv_bias_E,
            "x_proj": w.x_proj_SE, "dt_proj": w.dt_proj_ER, "dt_bias": w.dt_bias_E, "A": A_EN, "skip": w.D_E,
            "out_proj": w.out_proj_DE, "conv_state": state.conv_BKE, "ssm_state": state.ssm_BEN,
        }  # fmt: skip

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> Tensor:
        if x_BD.shape != (self.batch, self._width):
            raise ValueError(f"mamba_step: x_BD: expected shape {(self.batch, self._width)}, got {tuple(x_BD.shape)}")
        if self._library is None:
            return reference.mamba_step(x_BD, self._weights, self._state, eps=self._eps)
        if not self.native or x_BD.dtype != torch.float32:
            return self._by_block(x_BD)
        x, result_BD = x_BD.contiguous(), native.floats(*x_BD.shape)
        self._library.step(x=x, out=result_BD, **self.fields)
        return result_BD

    def _by_block(self, x_BD: Tensor) -> Tensor:
        """By the kernels for sequences, at length 1: for batches whose products are worth a BLAS, and other dtypes."""
        out = mamba_block(x_BD[:, None], self._weights, eps=self._eps, state=self._state, return_state=True)
        assert out.state is not None
        for held, new in zip(self._state, out.state, strict=True):
            held.copy_(new)
        return out.x_BLD[:, 0]


class DecodeStepper:
    """A whole model for one token after another, in one native call each: logits (B, V) from tokens (B,).

    The definition is `reference.decode_step`. `DecodeStepper.of` gives None where a part is not native.
    """

    @classmethod
    def of(
        cls, embedding_ID: Tensor, blocks: Sequence[Callable[[Tensor], Tensor]], norm_D: Tensor,
        scoring: LogitProjection, *, eps: float = 1e-5,
    ) -> DecodeStepper | None:  # fmt: skip
        """The native decoder of these parts, or None if a block is no native MambaStepper or a tensor not float32."""
        steppers = [block for block in blocks if isinstance(block, MambaStepper) and block.native]
        tensors = (embedding_ID, norm_D, scoring.matrix_VD)
        simple = all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        library = native.select("decode_step", embedding_ID, (torch.float32,)) if simple else None
        if library is None or not steppers or len(steppers) < len(blocks):
            return None
        return cls(library, embedding_ID, steppers, norm_D, scoring, eps)

    def __init__(
        self,
        library: Library,
        embedding_ID: Tensor,
        steppers: Sequence[MambaStepper],
        norm_D: Tensor,
        scoring: LogitProjection,
        eps: float,
    ) -> None:
        sizes = check_shapes("decode_step", embedding_ID=embedding_ID, norm_D=norm_D, matrix_VD=scoring.matrix_VD)
        self._library, self._batch, self._tokens, self._classes = library, steppers[0].batch, sizes["I"], sizes["V"]
        x_BD, z_BD = native.floats(2, self._batch, sizes["D"])
        blocks = torch.frombuffer(
            bytearray(b"".join(library.pack("step", x=x_BD, out=x_BD, **stepper.fields) for stepper in steppers)),
            dtype=torch.uint8,
        )
        self._held = steppers  # what the blocks point to
        self._fields: Mapping[str, Any] = {
            "B": self._batch, "D": sizes["D"], "V": sizes["V"], "layers": len(steppers), "unit": scoring.unit,
            "eps": eps, "scale": scoring.scale, "blocks": blocks, "embedding": embedding_ID, "norm": norm_D,
            "head": scoring.matrix_VD, "x": x_BD, "z": z_BD,
        }  # fmt: skip

    def __call__(self, tokens_B: Tensor) -> Tensor:
        tokens, values = tokens_B.long().contiguous(), tokens_B.tolist()
        if len(values) != self._batch or not all(0 <= token < self._tokens for token in values):
            raise ValueError(f"decode_step: expected {self._batch} tokens from 0 to {self._tokens - 1}, got {values}")
        logits_BV = native.floats(self._batch, self._classes)
        self._library.stack_step(tokens=tokens, scores=logits_BV, **self._fields)
        return logits_BV
