"""mamba_step: one token of a block in one native call; decode_step: one token of a whole model. Twins: `reference`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.allocator import on_large_pages
from protomamba.kernels.checks import Span, check_elements, check_shapes, overlap, span
from protomamba.kernels.mamba_block import check_block_shapes, mamba_block
from protomamba.kernels.native import Library
from protomamba.kernels.packed import WEIGHTS, PackedMatrix, pack, unpack
from protomamba.kernels.reference import BlockState, BlockWeights, LogitProjection


def mamba_step(x_BD: Tensor, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> Tensor:
    """One token of `mamba_block` for a batch: returns x (B, D) and updates `state` in place. No gradient.

    Native for float32 x, weights and state. ValueError for shapes that do not fit. For many tokens: `MambaStepper`.
    """
    return MambaStepper(weights, state, eps=eps)(x_BD)


# Up to this many rows the kernels here read the weights faster than a BLAS multiplies by them.
STEP_ROWS = 64
# The matrices of a block, and where they and their scales stand in the argument struct.
MATRICES = {
    "in_proj_WD": ("in_proj", "in_scale"),
    "x_proj_SE": ("x_proj", "x_scale"),
    "dt_proj_ER": ("dt_proj", "dt_scale"),
    "out_proj_DE": ("out_proj", "out_scale"),
}


class MambaStepper:
    """`mamba_step` for one token after another: from x (B, D) to x (B, D), moving `state` on in place.

    What does not change between tokens is done once, so the weights must stay as they are meanwhile. ValueError for
    shapes that do not fit.
    """

    def __init__(self, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> None:
        self._weights, self._state, self._eps = weights, state, eps
        sizes = check_block_shapes("mamba_step", weights, state)
        self.batch, self._width, self._packed = sizes["B"], sizes["D"], "fp32"
        self._library = native.select("mamba_step", state.ssm_BEN, (torch.float32,))
        tensors = (*weights, *state)
        simple = all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in tensors)
        self._fits = self._library is not None and simple
        self._written = [span(x) for x in state if x.is_contiguous() and x.is_cpu]
        _check_apart(self._written, [span(w) for w in weights if w is not None and w.is_contiguous() and w.is_cpu])
        taps_KE = weights.conv_weight_E1K.detach()[:, 0].t().contiguous()
        A_EN = -torch.exp(weights.A_log_EN.detach())
        w = weights
        self.fields: dict[str, Any] = {letter: sizes[letter] for letter in "BDENRK"} | {
            "eps": eps, "norm": w.norm_D, "taps": taps_KE, "conv_bias": w.conv_bias_E, "dt_bias": w.dt_bias_E,
            "A": A_EN, "skip": w.D_E, "conv_state": state.conv_BKE, "ssm_state": state.ssm_BEN,
        }  # fmt: skip
        self.pack("fp32")

    @property
    def native(self) -> bool:
        """Whether a token is one native call: with packed matrices, and for batches that are not worth a BLAS."""
        return self._fits and (self.batch <= STEP_ROWS or self._packed != "fp32")

    def pack(self, weights: str) -> None:
        """From here on take the matrices in "fp32", "bf16" or "int8" (`packed.pack`); all else stays in float32."""
        matrices = {name: w for name, w in self._weights._asdict().items() if name in MATRICES and w is not None}
        packed = {name: pack(w, weights) for name, w in matrices.items()}
        self._packed = weights
        self.fields["kind"] = WEIGHTS.index(weights)
        for name, matrix in packed.items():
            self.fields |= matrix.fields(*MATRICES[name])
        if weights != "fp32" and not self._fits:
            rounded = {name: unpack(packed[name]).to(w.dtype) for name, w in matrices.items()}
            self._weights = self._weights._replace(**rounded)

    @torch.no_grad()
    def __call__(self, x_BD: Tensor) -> Tensor:
        if x_BD.shape != (self.batch, self._width):
            raise ValueError(f"mamba_step: x_BD: expected shape {(self.batch, self._width)}, got {tuple(x_BD.shape)}")
        check_elements("mamba_step", "x_BD", x_BD)
        if x_BD.is_cpu != self._weights.norm_D.is_cpu:
            raise ValueError(f"mamba_step: x_BD: is on {x_BD.device}, and not all others are")
        if x_BD.is_cpu and x_BD.is_contiguous() and any(overlap(span(x_BD), state) for state in self._written):
            raise ValueError("mamba_step: x_BD: lies in the memory of the state, which is written")
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


def _check_apart(states: Sequence[Span], weights: Sequence[Span]) -> None:
    """ValueError for a state, which is written, in one memory with the other state or a weight."""
    if any(overlap(a, b) for at, a in enumerate(states) for b in (*states[:at], *weights)):
        raise ValueError("mamba_step: state: expected memory of its own, found it in that of a weight or another state")


class DecodeStepper:
    """A whole model for one token after another, in one native call each: logits (B, V) from tokens (B,).

    The definition is `reference.decode_step`. `DecodeStepper.of` gives None where a part is not native.
    """

    @classmethod
    def of(
        cls, embedding_ID: Tensor, blocks: Sequence[Callable[[Tensor], Tensor]], norm_D: Tensor,
        scoring: LogitProjection, *, eps: float = 1e-5, weights: str = "fp32",
    ) -> DecodeStepper | None:  # fmt: skip
        """The native decoder of these parts, or None if a block is no native MambaStepper or a tensor not float32.

        weights: what the projection's matrix is packed into (`packed.pack`); the blocks are taken as they are packed.
        """
        steppers = [block for block in blocks if isinstance(block, MambaStepper) and block.native]
        tensors = (embedding_ID, norm_D, scoring.matrix_VD)
        simple = all(x.dtype == torch.float32 and x.is_contiguous() for x in tensors)
        library = native.select("decode_step", embedding_ID, (torch.float32,)) if simple else None
        if library is None or not steppers or len(steppers) < len(blocks):
            return None
        return cls(library, embedding_ID, steppers, norm_D, scoring, eps, weights)

    def __init__(
        self,
        library: Library,
        embedding_ID: Tensor,
        steppers: Sequence[MambaStepper],
        norm_D: Tensor,
        scoring: LogitProjection,
        eps: float,
        weights: str,
    ) -> None:
        sizes = check_shapes("decode_step", embedding_ID=embedding_ID, norm_D=norm_D, matrix_VD=scoring.matrix_VD)
        self._library, self._batch, self._tokens, self._classes = library, steppers[0].batch, sizes["I"], sizes["V"]
        x_BD, z_BD = native.floats(2, self._batch, sizes["D"])
        head = _moved(pack(scoring.matrix_VD, weights), steppers)
        blocks = torch.frombuffer(
            bytearray(b"".join(library.pack("step", x=x_BD, out=x_BD, **stepper.fields) for stepper in steppers)),
            dtype=torch.uint8,
        )
        self._held = [dict(stepper.fields) for stepper in steppers]  # what the blocks point to
        self._fields: Mapping[str, Any] = {
            "B": self._batch, "D": sizes["D"], "V": sizes["V"], "layers": len(steppers), "unit": scoring.unit,
            "eps": eps, "scale": scoring.scale, "blocks": blocks, "embedding": embedding_ID, "norm": norm_D,
            "kind": head.kind, "x": x_BD, "z": z_BD, **head.fields("head", "head_scale"),
        }  # fmt: skip

    def __call__(self, tokens_B: Tensor) -> Tensor:
        check_elements("decode_step", "tokens_B", tokens_B)
        tokens, values = tokens_B.long().contiguous(), tokens_B.tolist()
        if len(values) != self._batch or not all(0 <= token < self._tokens for token in values):
            raise ValueError(f"decode_step: expected {self._batch} tokens from 0 to {self._tokens - 1}, got {values}")
        logits_BV = native.floats(self._batch, self._classes)
        self._library.stack_step(tokens=tokens, scores=logits_BV, **self._fields)
        return logits_BV


def _moved(head: PackedMatrix, steppers: Sequence[MambaStepper]) -> PackedMatrix:
    """The head's matrix, its packed data and that of the steppers' own matrices on large pages.

    Matrices in float32 stay where they are: they are the model's own.
    """
    if head.weights == "fp32":
        return head
    places = [(stepper.fields, name) for stepper in steppers for name, _ in MATRICES.values() if name in stepper.fields]
    *moved, head_data = on_large_pages([*(fields[name] for fields, name in places), head.data])
    for (fields, name), data in zip(places, moved, strict=True):
        fields[name] = data
    return head._replace(data=head_data)
