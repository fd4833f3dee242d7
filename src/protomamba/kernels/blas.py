"""The matrix products of a linear layer by the faster of torch's two BLAS libraries.

torch's float32 product goes to MKL, which on CPUs of other vendors runs its AVX2 code even where AVX-512 is there;
oneDNN, which torch also carries, does not. The choice is a rule on the CPU, never a timing: a resumed run must take the
same path.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomamba.kernels import native

# oneDNN, and torch around it, keep what they compiled for each shape of a product, 1,024 of them: where the number of
# rows differs from step to step (targets of events, rows of a file) that is hundreds of megabytes, which no step asks
# for again. A step's own products are a few dozen, and stay. Only single rows of ever new lengths gain by more. Kept;
# rows per second of processor time (width 64, 2 layers, lengths 8 to 120); memory then; of a training whose number of
# targets varies: 64: 221, 303 MiB, 373 MiB; 128: 256, 344, 405; 256: 322, 423, 479; 1,024: 430, 413, 846.
# Both caches read these when they are first used.
PRODUCTS_KEPT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
for _name, _kept in PRODUCTS_KEPT.items():
    os.environ.setdefault(_name, _kept)


@functools.cache
def linear_op() -> Any:
    """oneDNN's x @ w.T as torch exposes it, or None where this torch was built without it."""
    if not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return None
    try:
        return torch.ops.mkldnn._linear_pointwise
    except (AttributeError, RuntimeError):
        return None


def _cpu_vendor() -> str:
    if platform.system() != "Linux":
        return ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("vendor_id"):
            return line.split(":", 1)[1].strip()
    return ""


@functools.cache
def faster() -> str:
    """ "onednn" or "torch": which library is the faster here for float32."""
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    mkl_is_slow = wide and has_mkl and _cpu_vendor() not in ("", "GenuineIntel")
    return "onednn" if mkl_is_slow and linear_op() is not None else "torch"


class Blas:
    """The three products of a linear layer by one library; float32 by the one named, all else by torch."""

    def __init__(self, name: str) -> None:
        self.name = name

    def _by_onednn(self, x: Tensor) -> bool:
        return self.name == "onednn" and x.dtype == torch.float32

    def linear(self, x_TI: Tensor, w_OI: Tensor, add_TO: Tensor | None = None) -> Tensor:
        """x @ w.T (+ add): (T, I), (O, I) -> (T, O). An `add` wider than the product decides the dtype."""
        if self._by_onednn(x_TI):
            return _onednn(x_TI, w_OI, add_TO)
        return _torch(x_TI, w_OI.t(), add_TO)

    def grad_input(self, dy_TO: Tensor, w_OI: Tensor, add_TI: Tensor | None = None) -> Tensor:
        """dy @ w (+ add): (T, O), (O, I) -> (T, I). An `add` wider than the product decides the dtype."""
        if self._by_onednn(dy_TO):
            return _onednn(dy_TO, w_OI.t(), add_TI)
        return _torch(dy_TO, w_OI, add_TI)

    def grad_weight(self, dy_TO: Tensor, x_TI: Tensor) -> Tensor:
        """dy.T @ x: (T, O), (T, I) -> (O, I)."""
        if not self._by_onednn(dy_TO):
            return torch.mm(dy_TO.t(), x_TI)
        (n_token, n_out), n_in = dy_TO.shape, x_TI.shape[1]
        if n_token * n_out <= (n_token + n_out) * n_in:  # the fewer elements to transpose
            return _onednn(transpose(dy_TO), x_TI.t())
        return transpose(_onednn(transpose(x_TI), dy_TO.t()))


def _onednn(x: Tensor, w: Tensor, add: Tensor | None = None) -> Tensor:
    """x @ w.T (+ add) by oneDNN; x contiguous, w contiguous or the transpose of something contiguous."""
    op = torch.ops.mkldnn._linear_pointwise
    result: Tensor = op(x, w, None, "none", [], "") if add is None else op.binary(x, add, w, None, "add")
    return result


def _torch(a: Tensor, b: Tensor, add: Tensor | None) -> Tensor:
    if add is None:
        return torch.mm(a, b)
    return torch.addmm(add, a, b) if add.dtype == a.dtype else add + torch.mm(a, b)


def transpose(x_RC: Tensor) -> Tensor:
    """A contiguous transpose of a float32 matrix with adjacent columns."""
    library = native.select("transpose", x_RC, (torch.float32,))
    if library is None:
        return x_RC.t().contiguous()
    n_row, n_column = x_RC.shape
    out_CR = native.floats(n_column, n_row)
    library.transpose(rows=n_row, columns=n_column, in_row=x_RC.stride(0), x=x_RC, out=out_CR)
    return out_CR
