"""Every op of the registry against its twin in float64, on every path: a new op is held as soon as it is listed."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor

from protomamba import kernels
from protomamba.kernels import reference
from protomamba.kernels.cases import CASES, Sizes

from .closeness import assert_close
from .compare import Op, compare, enumerate_names

SIZES = [
    Sizes(B=2, L=63, D=24, E=48, N=16),
    Sizes(B=1, L=1, D=3, E=5, N=1, R=1, K=1, V=2, S=1),
    Sizes(B=3, L=70, D=20, E=33, N=5, R=2, K=6, V=300, S=31),
]
ops = pytest.mark.parametrize("name", CASES)
sizes = pytest.mark.parametrize("s", SIZES, ids=lambda s: f"B{s.B}-L{s.L}-E{s.E}")


def compare_case(name: str, s: Sizes, dtype: torch.dtype, without: Collection[str] = ()) -> None:
    case = CASES[name]
    given = case.inputs(s, without=without)
    wanted = {key: x for key, x in given.items() if key in case.differentiable and x.numel()}
    held = {key: x for key, x in given.items() if key not in wanted}
    if not wanted:
        exact = {key: x.double() if x.is_floating_point() else x for key, x in given.items()}
        found, expected = case.call(kernels, given), case.call(reference, exact)
        assert_close(dict(enumerate_names(found)), dict(enumerate_names(expected)), "forward", torch.float32)
        return

    def on(ops: Any) -> Op:
        def call(**tensors: Tensor) -> tuple[Tensor, ...]:
            return case.call(ops, {**tensors, **held})

        return call

    compare(on(kernels), on(reference), wanted, dtype, case.narrow)


@ops
@sizes
def test_everything_given(level: str, name: str, s: Sizes) -> None:
    compare_case(name, s, torch.float32)


@ops
@sizes
def test_nothing_optional_given(level: str, name: str, s: Sizes) -> None:
    compare_case(name, s, torch.float32, CASES[name].optional)


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.narrow])
@sizes
def test_bf16(level: str, name: str, s: Sizes) -> None:
    compare_case(name, s, torch.bfloat16)


def test_every_public_op_has_a_case() -> None:
    twins = {name for name in kernels.__all__ if callable(getattr(kernels, name)) and hasattr(reference, name)}
    classes = {name for name in twins if isinstance(getattr(kernels, name), type)}
    # Of any number of tensors, in place, or of places: with files of their own.
    others = {"adamw", "square_sums", "keep_lengths", "draw_classes"}
    assert twins - classes - others <= set(CASES)
