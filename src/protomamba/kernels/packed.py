"""Matrices in bf16 or int8 for decoding, which is bound by reading them: the layout that csrc/matrix.h reads."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from protomamba.errors import ConfigError

# The index is MatrixKind of csrc/matrix.h.
WEIGHTS = ("fp32", "bf16", "int8")
# A packed matrix is padded with zeros to whole groups of rows (MATRIX_GROUP) and pairs of columns.
GROUP, PAIR = 64, 2
LARGEST = 127


class PackedMatrix(NamedTuple):
    """A matrix (rows, columns) as the decoding kernels read it.

    data: the float32 matrix itself, or (groups of rows, pairs of columns, rows of the group, columns of the pair) in
    bfloat16 or int8: then a row is scale_O (float32, (rows,)) times data.
    """

    weights: str
    shape: tuple[int, int]
    data: Tensor
    scale_O: Tensor | None

    @property
    def kind(self) -> int:
        return WEIGHTS.index(self.weights)

    def fields(self, name: str, scale: str) -> dict[str, Tensor | None]:
        """Its part of an argument struct."""
        return {name: self.data, scale: self.scale_O}


def check_weights(weights: str) -> str:
    """`weights` itself; ConfigError unless it is one of WEIGHTS."""
    if weights not in WEIGHTS:
        raise ConfigError(f"weights: expected one of {', '.join(WEIGHTS)}, got {weights!r}")
    return weights


def pack(w_OI: Tensor, weights: str) -> PackedMatrix:
    """The float32 matrix in one of WEIGHTS. int8: the largest weight of a row becomes 127 or -127."""
    w_OI = w_OI.detach()
    shape = (w_OI.shape[0], w_OI.shape[1])
    if check_weights(weights) == "fp32":
        return PackedMatrix(weights, shape, w_OI.contiguous(), None)
    if weights == "bf16":
        return PackedMatrix(weights, shape, _grouped(w_OI.bfloat16()), None)
    scale_O = w_OI.abs().amax(1) / LARGEST
    integers_OI = torch.round(w_OI / scale_O.clamp_min(torch.finfo(torch.float32).tiny)[:, None])
    return PackedMatrix(weights, shape, _grouped(integers_OI.to(torch.int8)), scale_O)


def unpack(packed: PackedMatrix) -> Tensor:
    """float64 (rows, columns): the very numbers that the kernels multiply with."""
    rows, columns = packed.shape
    data = packed.data.double()
    if packed.weights != "fp32":
        data = data.transpose(1, 2).flatten(2).flatten(0, 1)[:rows, :columns]
    return data if packed.scale_O is None else data * packed.scale_O.double()[:, None]


def _grouped(w_OI: Tensor) -> Tensor:
    """(groups, pairs, GROUP, PAIR), contiguous."""
    padded_OI = torch.nn.functional.pad(w_OI, (0, -w_OI.shape[1] % PAIR, 0, -w_OI.shape[0] % GROUP))
    return padded_OI.view(-1, GROUP, padded_OI.shape[1] // PAIR, PAIR).transpose(1, 2).contiguous()
