"""A block in one native call, forward and backward: what `block_node` does op by op, with the same bits.

For float32 with products of our own, where all is kept for the backward pass. The products of an op push everything
else out of the caches, so that Python and torch between two ops cost several times what they do alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from protomamba.kernels import native
from protomamba.kernels.matmul import backend
from protomamba.kernels.native import Library
from protomamba.kernels.reference import BlockWeights

_allowed = True


@contextmanager
def op_by_op() -> Iterator[None]:
    """No block is one call meanwhile: for a profile of its ops, and to compare."""
    global _allowed
    before, _allowed = _allowed, False
    try:
        yield
    finally:
        _allowed = before


def possible(dtype: torch.dtype) -> bool:
    """Whether blocks whose products have this dtype can be one call."""
    return _allowed and dtype == torch.float32 and backend() == "native"


class Given(NamedTuple):
    """What a block is given: contiguous float32 tensors, and where a sequence begins anew."""

    reset: Tensor | None
    x: Tensor
    w: BlockWeights
    conv_state: Tensor | None
    ssm_state: Tensor | None

    def fields(self, A_EN: Tensor, eps: float) -> dict[str, Any]:
        """The fields of the op's struct that both passes have."""
        (batch, length, width), w = self.x.shape, self.w
        (inner, n_state), rank = A_EN.shape, w.dt_proj_ER.shape[1]
        return {
            "B": batch, "L": length, "D": width, "E": inner, "N": n_state, "R": rank, "K": w.conv_weight_E1K.shape[-1],
            "eps": eps, "reset": self.reset, "x": self.x, "norm": w.norm_D, "in_proj": w.in_proj_WD,
            "taps": w.conv_weight_E1K, "conv_bias": w.conv_bias_E, "x_proj": w.x_proj_SE, "dt_proj": w.dt_proj_ER,
            "dt_bias": w.dt_bias_E, "A": A_EN, "skip": w.D_E, "out_proj": w.out_proj_DE,
            "conv_initial": self.conv_state, "ssm_initial": self.ssm_state,
        }  # fmt: skip


class Kept(NamedTuple):
    """What the forward pass makes on its way, as (B, L, ...), (T,) or the scan's states; no uz in a compact block."""

    u: Tensor
    uz: Tensor | None
    normed: Tensor
    scale: Tensor
    projected: Tensor
    delta: Tensor
    chunks: Tensor | None


class Found(NamedTuple):
    """What the forward pass gives: x after the block, the states after the last token if wanted, and for the way back
    A = -exp(A_log) and what it kept."""

    x: Tensor
    conv_last: Tensor | None
    ssm_last: Tensor | None
    A_EN: Tensor
    kept: Kept


def forward(library: Library, given: Given, eps: float, keep: bool, want_state: bool) -> Found:
    """The block's output; `keep` for a backward pass."""
    A_EN = -torch.exp(given.w.A_log_EN)
    fields = given.fields(A_EN, eps)
    batch, length, inner, n_state, taps = (fields[letter] for letter in "BLENK")
    conv = native.floats(batch, taps - 1, inner) if want_state else None
    ssm = native.floats(batch, inner, n_state) if want_state else None
    kept = Kept(
        u=native.floats(batch, length, inner),
        uz=None if given.w.in_proj_WD is None else native.floats(batch, length, 2 * inner),
        normed=torch.empty_like(given.x),
        scale=native.floats(batch * length),
        projected=native.floats(batch, length, fields["R"] + 2 * n_state),
        delta=native.floats(batch, length, inner),
        chunks=native.floats(library.scan_chunk_floats(batch, length, inner, n_state)) if keep else None,
    )
    out = torch.empty_like(given.x)
    library.block_forward(**fields, **kept._asdict(), out=out, conv_last=conv, ssm_last=ssm)
    return Found(out, conv, ssm, A_EN, kept)


def backward(
    library: Library,
    given: Given,
    A_EN: Tensor,
    kept: Kept,
    dout: Tensor,
    last: Sequence[Tensor | None],
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:
    """The gradients of x and, in the order of BlockWeights and BlockState, of all else.

    last: of the convolution's and the scan's last state. needs: which are wanted, in the same order; those that cost no
    product of their own are made in any case.
    """
    w = given.w
    need_x, need_norm, need_in, *_, need_x_proj, need_dt_proj, _, _, _, need_out, _, _ = needs

    def wanted(x: Tensor | None, need: bool = True) -> Tensor | None:
        return None if x is None or not need else torch.empty_like(x)

    dx = wanted(given.x, need_x or need_norm)
    grads = (
        wanted(w.norm_D, need_norm), wanted(w.in_proj_WD, need_in), wanted(w.conv_weight_E1K), wanted(w.conv_bias_E),
        wanted(w.x_proj_SE, need_x_proj), wanted(w.dt_proj_ER, need_dt_proj), wanted(w.dt_bias_E),
        wanted(w.A_log_EN), wanted(w.D_E), wanted(w.out_proj_DE, need_out),
        wanted(given.conv_state), wanted(given.ssm_state),
    )  # fmt: skip
    library.block_backward(
        **given.fields(A_EN, 0.0), **kept._asdict(), dout=dout, dconv_last=last[0], dssm_last=last[1], dx=dx,
        **dict(zip(_GRADIENTS, grads, strict=True)),
    )  # fmt: skip
    return dx, *grads


_GRADIENTS = (
    "dnorm", "d_in_proj", "dtaps", "dconv_bias", "d_x_proj", "d_dt_proj", "d_dt_bias", "dA_log", "dskip", "d_out_proj",
    "dconv_initial", "dssm_initial",
)  # fmt: skip
