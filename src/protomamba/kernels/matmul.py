"""The matrix products of a linear layer, by our own kernel where it is the fastest, else by torch's BLAS libraries.

Ours (csrc/matmul.h) has the same bits on any number of threads, and a row's do not depend on the rows beside it. The
choice is a rule on the CPU, never a timing: a resumed run must take the same path. PROTOMAMBA_MATMUL (native, onednn or
torch) overrides it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from protomamba.errors import ConfigError
from protomamba.kernels import blas, native, reference
from protomamba.kernels.blas import Blas
from protomamba.kernels.checks import check_shapes
from protomamba.kernels.native import Library

BACKENDS = ("native", "onednn", "torch")
# Up to this many rows a product is bound by reading the matrix, which no BLAS does at the memory's speed.
FEW_ROWS = 8


@functools.cache
def backend() -> str:
    """ "native", "onednn" or "torch": what the float32 products use."""
    forced = os.environ.get("PROTOMAMBA_MATMUL")
    if not forced:
        library = native.default()
        return "native" if library is not None and library.fast_matmul else blas.faster()
    if forced not in BACKENDS:
        raise ConfigError(f"PROTOMAMBA_MATMUL: expected one of {', '.join(BACKENDS)}, got {forced!r}")
    if forced == "onednn" and blas.linear_op() is None:
        raise ConfigError("PROTOMAMBA_MATMUL=onednn: this torch is built without oneDNN")
    if forced == "native" and native.default() is None:
        raise ConfigError(f"PROTOMAMBA_MATMUL=native: {native.available()[1]}")
    return forced


_BLAS = {name: Blas(name) for name in ("onednn", "torch")}


def _blas() -> Blas:
    return _BLAS.get(backend()) or _BLAS[blas.faster()]


def _ours(x: Tensor) -> Library | None:
    """The library whose kernel is to be used for x, if any."""
    return native.default() if x.dtype == torch.float32 and backend() == "native" else None


def matmul(
    library: Library, a: Tensor, b: Tensor, *, turn_a: bool = False, turn_b: bool = False, add: Tensor | None = None
) -> Tensor:
    """a @ b (+ add) of float32 matrices, either of them given as its transpose."""
    a, b = native.rows(a), native.rows(b)
    add = None if add is None else native.rows(add)
    inner, rows = a.shape if turn_a else a.shape[::-1]
    columns = b.shape[0] if turn_b else b.shape[1]
    out = native.floats(rows, columns)
    library.matmul(
        M=rows, N=columns, K=inner, a_row=a.stride(0), b_row=b.stride(0), add_row=0 if add is None else add.stride(0),
        out_row=columns, a_transposed=turn_a, b_transposed=turn_b, a=a, b=b, add=add, out=out,
    )  # fmt: skip
    return out


def linear(x_TI: Tensor, w_OI: Tensor, add_TO: Tensor | None = None) -> Tensor:
    """x @ w.T (+ add): (T, I), (O, I) -> (T, O). An `add` wider than the product decides the dtype."""
    if library := _ours(x_TI):
        return matmul(library, x_TI, w_OI, turn_b=True, add=add_TO)
    return _blas().linear(x_TI, w_OI, add_TO)


def linear_by_name() -> dict[str, Callable[[Tensor, Tensor], Tensor]]:
    """`linear` by each backend that is here."""
    found: dict[str, Callable[[Tensor, Tensor], Tensor]] = {}
    if library := native.default():
        found["native"] = partial(matmul, library, turn_b=True)
    if blas.linear_op() is not None:
        found["onednn"] = _BLAS["onednn"].linear
    return found | {"torch": _BLAS["torch"].linear}


def grad_input(dy_TO: Tensor, w_OI: Tensor, add_TI: Tensor | None = None) -> Tensor:
    """dy @ w (+ add): (T, O), (O, I) -> (T, I). An `add` wider than the product decides the dtype."""
    if library := _ours(dy_TO):
        return matmul(library, dy_TO, w_OI, add=add_TI)
    return _blas().grad_input(dy_TO, w_OI, add_TI)


def grad_weight(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dy.T @ x: (T, O), (T, I) -> (O, I)."""
    library = _ours(dy_TO)
    if library is None:
        return _blas().grad_weight(dy_TO, x_TI)
    return matmul(library, dy_TO, x_TI, turn_a=True)


def product(x_TI: Tensor, w_OI: Tensor) -> Tensor:
    """x @ w.T: (T, I), (O, I) -> (T, O), at the speed of reading w once for up to FEW_ROWS rows: for decoding.

    Differentiable; the kernel of few rows is not, and runs where nothing wants a gradient. Native for float32.
    ValueError for shapes that do not fit.
    """
    check_shapes("product", x_TI=x_TI, w_OI=w_OI)
    if native.needs_backward(x_TI, w_OI) or w_OI.dtype != x_TI.dtype:
        return reference.product(x_TI, w_OI)
    library = native.select("product", x_TI, (torch.float32,))
    if library is None:
        return reference.product(x_TI, w_OI)
    x, w = x_TI.contiguous(), w_OI.contiguous()
    if len(x) > FEW_ROWS:
        return linear(x, w)
    out_TO = native.floats(len(x), len(w))
    library.product(T=len(x), rows=w.shape[0], columns=w.shape[1], x_stride=x.shape[1], kind=0, x=x, w=w, y=out_TO)
    return out_TO
