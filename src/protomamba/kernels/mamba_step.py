"""mamba_step: one token of a whole block in one native call. The definition is in `reference`."""

from __future__ import annotations

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.mamba_block import check_block_shapes, mamba_block
from protomamba.kernels.native import float_bits, pointer
from protomamba.kernels.reference import BlockState, BlockWeights

# Above this batch the matrix products are worth a BLAS.
LARGEST_BATCH = 8


@torch.no_grad()
def mamba_step(x_BD: Tensor, weights: BlockWeights, state: BlockState, *, eps: float = 1e-5) -> Tensor:
    """One token of `mamba_block` for a batch: returns x (B, D) and updates `state` in place. No gradient.

    Native for float32 x, weights and state. ValueError for shapes that do not fit.
    """
    sizes = check_block_shapes("mamba_step", weights, state, x_BD=x_BD)
    library = native.select("mamba_step", x_BD, (torch.float32,))
    if library is None:
        return reference.mamba_step(x_BD, weights, state, eps=eps)
    tensors = (*weights, *state)
    simple = all(x is None or (x.dtype == torch.float32 and x.is_contiguous()) for x in tensors)
    if not simple or sizes["B"] > LARGEST_BATCH:
        out = mamba_block(x_BD[:, None], weights, eps=eps, state=state, return_state=True)
        assert out.state is not None
        state.conv_BKE.copy_(out.state.conv_BKE)
        state.ssm_BEN.copy_(out.state.ssm_BEN)
        return out.x_BLD[:, 0]
    x, result_BD = x_BD.contiguous(), torch.empty(x_BD.shape)
    library.call(
        "step",
        *(sizes[letter] for letter in "BDENRK"), float_bits(eps),
        pointer(x), *(pointer(tensor) for tensor in tensors), pointer(result_BD),
    )  # fmt: skip
    return result_BD
