"""The matrix products of a linear layer, on the faster of torch's two BLAS libraries; of few rows, on a kernel of ours.

torch's float32 product goes to MKL, which on CPUs of other vendors runs its AVX2 code even where AVX-512 is there;
oneDNN, which torch also carries, does not. The choice is a rule on the CPU, never a timing: a resumed run must take the
same path. PROTOMAMBA_MATMUL (torch or onednn) overrides it.
"""

from __future__ import annotations

import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomamba.errors import ConfigError
from protomamba.kernels import native, reference
from protomamba.kernels.checks import check_shapes

BACKENDS = ("torch", "onednn")
# oneDNN, and torch around it, keep what they compiled for each shape of a product, 1,024 of them: where the number of
# rows differs from step to step (targets of events, rows of a file) that is hundreds of megabytes, which no step asks
# for again. A step's own products are a few dozen, and stay. Only single rows of ever new lengths gain by more. Kept;
# rows per second of processor time (width 64, 2 layers, lengths 8 to 120); memory then; of a training whose number of
# targets varies: 64: 221, 303 MiB, 373 MiB; 128: 256, 344, 405; 256: 322, 423, 479; 1,024: 430, 413, 846.
# Both caches read these when they are first used.
PRODUCTS_KEPT = {"LRU_CACHE_CAPACITY": "128", "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128"}
for _name, _kept in PRODUCTS_KEPT.items():
    os.environ.setdefault(_name, _kept)
# Up to this many rows a product is bound by reading the matrix, which no BLAS does at the memory's speed.
FEW_ROWS = 8


@functools.cache
def _linear_op() -> Any:
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
def backend() -> str:
    """ "onednn" or "torch": which library the float32 products use."""
    forced = os.environ.get("PROTOMAMBA_MATMUL")
    if forced:
        if forced not in BACKENDS:
            raise ConfigError(f"PROTOMAMBA_MATMUL: expected one of {', '.join(BACKENDS)}, got {forced!r}")
        if forced == "onednn" and _linear_op() is None:
            raise ConfigError("PROTOMAMBA_MATMUL=onednn: this torch is built without oneDNN")
        return forced
    wide = torch.backends.cpu.get_cpu_capability() == "AVX512"
    has_mkl = torch.backends.mkl.is_available()  # type: ignore[no-untyped-call]
    mkl_is_slow = wide and has_mkl and _cpu_vendor() not in ("", "GenuineIntel")
    return "onednn" if mkl_is_slow and _linear_op() is not None else "torch"


def _by_onednn(x: Tensor) -> bool:
    return x.dtype == torch.float32 and backend() == "onednn"


def _product(x: Tensor, w: Tensor, add: Tensor | None = None) -> Tensor:
    """x @ w.T (+ add) by oneDNN; x contiguous, w contiguous or the transpose of something contiguous."""
    op = torch.ops.mkldnn._linear_pointwise
    result: Tensor = op(x, w, None, "none", [], "") if add is None else op.binary(x, add, w, None, "add")
    return result


def linear(x_TI: Tensor, w_OI: Tensor, add_TO: Tensor | None = None) -> Tensor:
    """x @ w.T (+ add): (T, I), (O, I) -> (T, O). An `add` wider than the product decides the dtype."""
    if _by_onednn(x_TI):
        return _product(x_TI, w_OI, add_TO)
    return _torch_product(x_TI, w_OI.t(), add_TO)


def grad_input(dy_TO: Tensor, w_OI: Tensor, add_TI: Tensor | None = None) -> Tensor:
    """dy @ w (+ add): (T, O), (O, I) -> (T, I). An `add` wider than the product decides the dtype."""
    if _by_onednn(dy_TO):
        return _product(dy_TO, w_OI.t(), add_TI)
    return _torch_product(dy_TO, w_OI, add_TI)


def _torch_product(a: Tensor, b: Tensor, add: Tensor | None) -> Tensor:
    if add is None:
        return torch.mm(a, b)
    return torch.addmm(add, a, b) if add.dtype == a.dtype else add + torch.mm(a, b)


def grad_weight(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """dy.T @ x: (T, O), (T, I) -> (O, I)."""
    if not _by_onednn(dy_TO):
        return torch.mm(dy_TO.t(), x_TI)
    (n_token, n_out), n_in = dy_TO.shape, x_TI.shape[1]
    if n_token * n_out <= (n_token + n_out) * n_in:  # the fewer elements to transpose
        return _product(transpose(dy_TO), x_TI.t())
    return transpose(_product(transpose(x_TI), dy_TO.t()))


def transpose(x_RC: Tensor) -> Tensor:
    """A contiguous transpose of a float32 matrix with adjacent columns."""
    library = native.select("transpose", x_RC, (torch.float32,))
    if library is None:
        return x_RC.t().contiguous()
    n_row, n_column = x_RC.shape
    out_CR = native.floats(n_column, n_row)
    library.transpose(rows=n_row, columns=n_column, in_row=x_RC.stride(0), x=x_RC, out=out_CR)
    return out_CR


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
