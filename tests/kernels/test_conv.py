"""causal_conv against its twin in float64, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protomamba.kernels import causal_conv, reference
from protomamba.kernels.cases import CASES, Sizes

from .compare import compare

Shape = tuple[int, int, int, int]
SHAPES = [(2, 63, 24, 4), (1, 1, 5, 4), (2, 2, 70, 6), (1, 257, 33, 1), (3, 130, 48, 4), (17, 5, 16, 2)]


def name(shape: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("BLEK", shape, strict=True))


def make_inputs(shape: Shape, optional: bool = True) -> dict[str, Tensor]:
    case = CASES["causal_conv"]
    return case.inputs(
        Sizes(**dict(zip("BLEK", shape, strict=True))), without={"reset_BL"} if optional else case.optional
    )


def compare_conv(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    def op(**tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(causal_conv(**tensors, **options, return_last_state=True))

    def twin(**tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.causal_conv(**tensors, **options, return_last_state=True))

    compare(op, twin, inputs, dtype, CASES["causal_conv"].narrow)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("resets", [False, True], ids=["whole", "resets"])
def test_everything_given(level: str, shape: Shape, dtype: torch.dtype, resets: bool) -> None:
    compare_conv(make_inputs(shape), dtype, reset_BL=torch.rand(shape[:2]) < 0.2 if resets else None)


@pytest.mark.parametrize("shape", SHAPES[:3], ids=name)
def test_nothing_optional_given(level: str, shape: Shape) -> None:
    compare_conv(make_inputs(shape, optional=False))


def test_half_of_a_wider_buffer(level: str) -> None:
    inputs = make_inputs((2, 70, 24, 4))
    half = torch.randn(2, 75, 48)[:, 5:, 24:]
    strided = causal_conv(**inputs | {"u_BLE": half})
    assert torch.equal(strided, causal_conv(**inputs | {"u_BLE": half.contiguous()}))


@pytest.mark.parametrize("K", [1, 2, 4, 7])
def test_in_pieces_equals_the_whole(level: str, K: int) -> None:
    inputs = make_inputs((2, 90, 20, K)) | {"initial_state_BKE": torch.randn(2, K - 1, 20)}
    reset_BL = torch.rand(2, 90) < 0.1
    whole, last = causal_conv(**inputs, return_last_state=True, reset_BL=reset_BL)
    pieces, state = [], inputs.pop("initial_state_BKE")
    for part in (slice(0, 1), slice(1, 3), slice(3, 67), slice(67, 90)):
        cut = inputs | {"u_BLE": inputs["u_BLE"][:, part], "initial_state_BKE": state}
        y_BLE, state = causal_conv(**cut, return_last_state=True, reset_BL=reset_BL[:, part])
        pieces.append(y_BLE)
    assert torch.equal(state, last)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-6, atol=1e-6)


shapes = st.tuples(st.integers(1, 19), st.integers(1, 150), st.integers(1, 80), st.integers(1, 8))


@settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(shapes, st.booleans(), st.integers(0, 2**31))
def test_random_shapes(level: str, shape: Shape, resets: bool, seed: int) -> None:
    torch.manual_seed(seed)
    compare_conv(make_inputs(shape), reset_BL=torch.rand(shape[:2]) < 0.1 if resets else None)


def test_shapes_that_do_not_fit(level: str) -> None:
    inputs = make_inputs((2, 5, 7, 4))
    with pytest.raises(ValueError, match=r"causal_conv: weight_E1K: expected shape \(E=7, 1, K\), got \(7, 2, 4\)"):
        causal_conv(**inputs | {"weight_E1K": torch.randn(7, 2, 4)})
    with pytest.raises(ValueError, match=r"causal_conv: initial_state_BHE: expected shape \(B=2, H=3, E=7\)"):
        causal_conv(**inputs | {"initial_state_BKE": torch.randn(2, 4, 7)})
