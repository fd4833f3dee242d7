"""mamba_block: a whole residual Mamba (or compact) block as one autograd node (`block_node`); large ones in pieces.

The definition is `reference.mamba_block`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from protomamba.kernels import native, reference, whole_block
from protomamba.kernels.block_node import BlockCall, BlockNode, Remake
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.reference import BlockOutput, BlockState, BlockWeights, matmul_dtype

RECOMPUTE, ACTIVATIONS = ("none", "cheap", "blocks"), ("fp32", "bf16")
# Elements of an activation (B, L, E) that are worth sparing: 32 MiB, from where on malloc keeps nothing (`allocator`).
LARGE = 1 << 23
CHUNK = 64  # of the scan: a sequence cut at multiples of it has the same bits


def mamba_block(
    x_BLD: Tensor,
    weights: BlockWeights,
    *,
    eps: float = 1e-5,
    precision: str = "fp32",
    state: BlockState | None = None,
    return_state: bool = False,
    reset_BL: Tensor | None = None,
    want_u: bool = False,
    recompute: str = "cheap",
    activations: str = "fp32",
) -> BlockOutput:
    """x + out_proj(scan(conv(in_proj(rms_norm(x))))): see `reference.mamba_block`, which this equals.

    Native for float32 x. Frozen weights cost no gradient product, and without gradients nothing is kept. What is kept
    for the backward pass, `recompute` says, with the same bits: "none" keeps all, "cheap" makes the norm, the
    convolution and dt again where an activation (B, L, E) is larger than 32 MiB, "blocks" keeps x
    alone and makes everything again. With `activations` "bf16" it is kept in bfloat16, x included: the output stays,
    the gradients change by what that rounds away, and the modes of `recompute` no longer agree to the bit. ValueError
    for shapes that do not fit, and for another precision, recompute or activations than these.
    """
    for name, word, words in (("recompute", recompute, RECOMPUTE), ("activations", activations, ACTIVATIONS)):
        if word not in words:
            raise ValueError(f"mamba_block: {name}: expected one of {', '.join(words)}, got {word!r}")
    check_block_shapes("mamba_block", weights, state, x_BLD=x_BLD, reset_BL=reset_BL)
    dtype = matmul_dtype(precision, x_BLD)
    library = native.select("mamba_block", x_BLD, (torch.float32,))
    if library is None:
        return reference.mamba_block(
            x_BLD, weights, eps=eps, precision=precision, state=state, return_state=return_state, reset_BL=reset_BL,
            want_u=want_u,
        )  # fmt: skip
    tensors = [None if w is None else w.float().contiguous() for w in (*weights, *(state or (None, None)))]
    reset = None if reset_BL is None else reset_BL.bool().contiguous()
    batch, length, width = *x_BLD.shape[:2], weights.D_E.shape[0]
    large = batch * length * width > LARGE
    remake = {"none": Remake.NOTHING, "cheap": Remake.CHEAP if large else Remake.NOTHING, "blocks": Remake.ALL}[
        recompute
    ]
    keep, narrow = native.needs_backward(x_BLD, *tensors), activations == "bf16"
    whole = remake == Remake.NOTHING and not narrow and whole_block.possible(dtype)
    call = BlockCall(library, keep, eps, dtype, return_state, want_u, remake, narrow, whole)
    if large:
        return _in_pieces(call, reset, x_BLD.contiguous(), tensors, LARGE // (2 * width))
    return _whole(call, reset, x_BLD.contiguous(), tensors)


def _whole(call: BlockCall, reset: Tensor | None, x: Tensor, tensors: Sequence[Tensor | None]) -> BlockOutput:
    out, conv, ssm, u = native.apply(BlockNode, call, reset, x, *tensors)
    return BlockOutput(out, BlockState(conv, ssm) if call.want_state else None, u)


def _in_pieces(
    call: BlockCall, reset: Tensor | None, x: Tensor, tensors: Sequence[Tensor | None], most: int
) -> BlockOutput:
    """Some rows after another, and of rows that are longer than `most` tokens one part after another, which hands the
    states on: what a piece needs meanwhile stays within memory that malloc gives again, and never all of it is needed.

    The pieces depend on the shape alone, so that the bits do.
    """
    batch, length = x.shape[:2]
    rows, columns = max(1, most // length), max(CHUNK, most // CHUNK * CHUNK)
    weights, (conv, ssm) = tensors[:-2], tensors[-2:]
    found: list[BlockOutput] = []
    for b in range(0, batch, rows):
        row = slice(b, b + rows)
        parts: list[BlockOutput] = []
        held = [None if s is None else s[row].contiguous() for s in (conv, ssm)]
        for t in range(0, length, columns):
            at = (row, slice(t, t + columns))
            piece = call._replace(want_state=call.want_state or t + columns < length)
            mask = None if reset is None else reset[at].contiguous()
            parts.append(_whole(piece, mask, x[at].contiguous(), [*weights, *held]))
            held = [*(parts[-1].state or (None, None))]
        found.append(_joined(parts, 1, call)._replace(state=parts[-1].state))
    states = [out.state for out in found if out.state is not None]
    state = BlockState(*(torch.cat(s) for s in zip(*states, strict=True))) if call.want_state else None
    return _joined(found, 0, call)._replace(state=state)


def _joined(parts: Sequence[BlockOutput], dim: int, call: BlockCall) -> BlockOutput:
    u = torch.cat([part.u_BLE for part in parts if part.u_BLE is not None], dim) if call.want_u else None
    return BlockOutput(torch.cat([part.x_BLD for part in parts], dim), None, u)


def check_block_shapes(op: str, w: BlockWeights, state: BlockState | None, **x: Tensor | None) -> dict[str, int]:
    """Checks the weights, the state and `x` against each other; returns the sizes."""
    sizes = check_shapes(
        op, sizes=None, **x,
        norm_D=w.norm_D, conv_weight_E1K=w.conv_weight_E1K, conv_bias_E=w.conv_bias_E, A_log_EN=w.A_log_EN,
        dt_proj_ER=w.dt_proj_ER, dt_bias_E=w.dt_bias_E, D_E=w.D_E, out_proj_DE=w.out_proj_DE,
    )  # fmt: skip
    sizes |= {"W": 2 * sizes["E"], "S": sizes["R"] + 2 * sizes["N"], "H": sizes["K"] - 1}
    check_shapes(op, sizes=sizes, like=w.norm_D, in_proj_WD=w.in_proj_WD, x_proj_SE=w.x_proj_SE)
    if w.in_proj_WD is None and sizes["E"] != sizes["D"]:
        raise ValueError(f"{op}: without in_proj expected E = D, got E={sizes['E']} D={sizes['D']}")
    if state is not None:
        sizes = check_shapes(op, sizes=sizes, like=w.norm_D, state_ssm_BEN=state.ssm_BEN)
        if sizes["H"] > 0:
            check_shapes(op, sizes=sizes, like=w.norm_D, state_conv_BHE=state.conv_BKE)
    return sizes
