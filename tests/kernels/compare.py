"""Holds an op against its twin in float64: values and the gradient of every input, from the very numbers the op saw."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .closeness import assert_close, gradients

Op = Callable[..., tuple[Tensor, ...]]


def compare(
    op: Op,
    twin: Op,
    inputs: Mapping[str, Tensor],
    dtype: torch.dtype = torch.float32,
    narrow: frozenset[str] = frozenset(),
    kind: str = "gradient",
) -> None:
    """`op` and `twin` take the inputs by name and return tensors. Those in `narrow` are given in `dtype`, the rest in
    float32; where `dtype` is bfloat16 only results of that dtype get its tolerance."""
    given = {name: x.to(dtype if name in narrow else torch.float32).requires_grad_() for name, x in inputs.items()}
    exact = {name: x.detach().double().requires_grad_() for name, x in given.items()}
    outputs, expected = op(**given), twin(**exact)
    weights = [torch.randn(out.shape).to(out.dtype) for out in outputs]
    _hold("forward", dict(enumerate_names(outputs)), dict(enumerate_names(expected)), "forward")
    _hold("gradient", gradients(outputs, given, weights), gradients(expected, exact, weights), kind)


def enumerate_names(tensors: tuple[Tensor, ...]) -> list[tuple[str, Tensor]]:
    return [(f"output {i}", x) for i, x in enumerate(tensors)]


def _hold(what: str, actual: dict[str, Tensor], expected: dict[str, Tensor], kind: str) -> None:
    for dtype in {x.dtype for x in actual.values()}:
        chosen = {name: x for name, x in actual.items() if x.dtype == dtype}
        used = kind if dtype == torch.bfloat16 else what
        assert_close(chosen, {name: expected[name] for name in chosen}, used, dtype)
