"""The floor: what no implementation of a training step can leave out. The matrix products of its blocks (in_proj,
x_proj, dt_proj, out_proj), forward and both backward ones, on dense tensors of the step's shapes.

Once as one would write them with torch (F.linear and mm), once through `kernels.blas` by the faster of torch's two BLAS
libraries: where the two floors differ, a step may well be below the first one. The second holds the head's three
products too, over as many classes as its sample has. Where our own product is the fastest, a step uses neither, and may
be below both.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomamba.bench.shapes import Shape
from protomamba.kernels import blas
from protomamba.model.mixers import mixer


class Product(NamedTuple):
    """The tensors of one linear layer: input (T, I), weight (O, I), gradient of the output (T, O)."""

    x_TI: Tensor
    w_OI: Tensor
    dy_TO: Tensor


def products(shape: Shape, dtype: torch.dtype = torch.float32) -> list[Product]:
    """The linear layers of all blocks, each with a weight of its own; inputs of one shape share their memory."""
    with torch.device("meta"):
        inside = mixer.find(shape.layer)(shape.config()).named_modules()
    in_order = sorted(inside, key=lambda named: named[0] != "in_proj")  # it is made last, and used first
    layers = [(part.in_features, part.out_features) for _, part in in_order if isinstance(part, nn.Linear)]
    widths = {width for layer in layers for width in layer}
    values = {width: torch.randn(shape.tokens, width).to(dtype) for width in widths}
    return [
        Product(values[n_in], torch.randn(n_out, n_in).to(dtype), values[n_out])
        for _ in range(shape.layers)
        for n_in, n_out in layers
    ]


MOST_CLASSES = 1_024


def head_product(shape: Shape, sampled: int, dtype: torch.dtype = torch.float32) -> Product:
    """The head's: features against the classes that a step looks at, at most MOST_CLASSES."""
    classes = min(sampled, MOST_CLASSES, shape.vocab_size)
    sizes = (shape.tokens, shape.d_model), (classes, shape.d_model), (shape.tokens, classes)
    return Product(*(torch.randn(size).to(dtype) for size in sizes))


def torch_floor(layers: list[Product]) -> Callable[[], None]:
    """The products of one step by plain torch."""

    def run() -> None:
        with torch.no_grad():
            for x_TI, w_OI, _ in layers:
                F.linear(x_TI, w_OI)
            for x_TI, w_OI, dy_TO in reversed(layers):
                torch.mm(dy_TO, w_OI)
                torch.mm(dy_TO.t(), x_TI)

    return run


def own_floor(layers: list[Product]) -> Callable[[], None]:
    """The same by the faster of torch's libraries."""
    library = blas.Blas(blas.faster())

    def run() -> None:
        with torch.no_grad():
            for x_TI, w_OI, _ in layers:
                library.linear(x_TI, w_OI)
            for x_TI, w_OI, dy_TO in reversed(layers):
                library.grad_input(dy_TO, w_OI)
                library.grad_weight(dy_TO, x_TI)

    return run
