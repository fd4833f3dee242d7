"""selective_scan against its twin in float64, on every path."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from protomamba.kernels import reference, selective_scan
from protomamba.kernels.cases import CASES, Sizes

from .compare import compare

SHAPES = [(2, 63, 24, 16), (1, 1, 5, 1), (2, 257, 33, 5), (1, 130, 17, 64), (3, 64, 64, 16), (18, 3, 40, 7)]


def name(shape: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("BLEN", shape, strict=True))


def make_inputs(shape: tuple[int, int, int, int], optional: bool = True) -> dict[str, Tensor]:
    """Without softplus, which "optional" stands for too, a step has to be positive by itself."""
    case = CASES["selective_scan"]
    inputs = case.inputs(
        Sizes(**dict(zip("BLEN", shape, strict=True))), without={"reset_BL"} if optional else case.optional
    )
    return inputs if optional else inputs | {"delta_BLE": inputs["delta_BLE"].abs()}


def compare_scan(inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32, **options: Any) -> None:
    def op(**tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(selective_scan(**tensors, **options, return_last_state=True))

    def twin(**tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.selective_scan(**tensors, **options, return_last_state=True))

    compare(op, twin, inputs, dtype, CASES["selective_scan"].narrow)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_everything_given(level: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
    reset_BL = torch.rand(shape[:2]) < 0.05
    compare_scan(make_inputs(shape), dtype, delta_softplus=True, reset_BL=reset_BL)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=name)
def test_nothing_optional_given(level: str, shape: tuple[int, int, int, int]) -> None:
    compare_scan(make_inputs(shape, optional=False))


def test_without_the_last_state_only_y_is_returned(level: str) -> None:
    y_BLE = selective_scan(**make_inputs((2, 5, 7, 3)), delta_softplus=True)
    assert isinstance(y_BLE, Tensor)


def test_slices_of_wider_buffers(level: str) -> None:
    """u and z are halves of one buffer, B and C slices of another, and the batch is not contiguous either."""
    B, L, E, N = 2, 70, 24, 16
    uz, projected = torch.randn(B, L + 3, 2 * E)[:, 3:], torch.randn(B, L, 5 + 2 * N)
    inputs = make_inputs((B, L, E, N))
    whole = {
        "u_BLE": uz[..., :E],
        "z_BLE": uz[..., E:],
        "B_BLN": projected[..., 5 : 5 + N],
        "C_BLN": projected[..., 5 + N :],
    }
    strided = selective_scan(**inputs | whole, delta_softplus=True)
    dense = selective_scan(**inputs | {key: x.contiguous() for key, x in whole.items()}, delta_softplus=True)
    torch.testing.assert_close(strided, dense, rtol=1e-6, atol=1e-6)


def test_lanes_that_are_not_adjacent(level: str) -> None:
    inputs = make_inputs((2, 9, 8, 4))
    turned = inputs | {"u_BLE": inputs["u_BLE"].transpose(1, 2).contiguous().transpose(1, 2)}
    assert torch.equal(selective_scan(**turned, delta_softplus=True), selective_scan(**inputs, delta_softplus=True))


def test_in_pieces_equals_the_whole(level: str) -> None:
    inputs = make_inputs((2, 150, 20, 16))
    whole, last = selective_scan(**inputs, delta_softplus=True, return_last_state=True)
    pieces, state = [], inputs.pop("initial_state_BEN")
    for part in (slice(0, 1), slice(1, 66), slice(66, 150)):
        cut = {key: x[:, part] if key.endswith(("BLE", "BLN")) else x for key, x in inputs.items()}
        y_BLE, state = selective_scan(**cut, delta_softplus=True, initial_state_BEN=state, return_last_state=True)
        pieces.append(y_BLE)
    torch.testing.assert_close(torch.cat(pieces, 1), whole, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)


def test_a_reset_hides_everything_before_it(level: str) -> None:
    inputs = make_inputs((1, 80, 8, 4))
    reset_BL = torch.zeros(1, 80, dtype=torch.bool)
    reset_BL[0, 70] = True
    later = selective_scan(**inputs, delta_softplus=True, reset_BL=reset_BL)[:, 70:]
    alone = {key: x[:, 70:] if key.endswith(("BLE", "BLN")) else x for key, x in inputs.items()}
    alone.pop("initial_state_BEN")
    torch.testing.assert_close(later, selective_scan(**alone, delta_softplus=True), rtol=1e-5, atol=1e-5)


def test_extreme_steps_stay_finite(level: str) -> None:
    """softplus and exp at the ends of their range: a step of 1e4, and one that underflows."""
    inputs = make_inputs((1, 6, 4, 2))
    inputs["delta_BLE"] = torch.tensor([1e4, -1e4, 88.0, -88.0, 0.0, 20.0])[None, :, None].expand(1, 6, 4).contiguous()
    given = {key: x.requires_grad_() for key, x in inputs.items()}
    y_BLE = selective_scan(**given, delta_softplus=True)
    expected = reference.selective_scan(**{key: x.detach().double() for key, x in inputs.items()}, delta_softplus=True)
    torch.testing.assert_close(y_BLE.double(), expected, rtol=1e-4, atol=1e-4)
    for gradient in torch.autograd.grad(y_BLE.sum(), list(given.values())):
        assert gradient.isfinite().all()


def test_a_nan_is_passed_on(level: str) -> None:
    inputs = make_inputs((1, 5, 6, 3))
    inputs["delta_BLE"][0, 2, 1] = float("nan")
    y_BLE = selective_scan(**inputs, delta_softplus=True)
    assert y_BLE[0, 2:, 1].isnan().all() and y_BLE[0, :2].isfinite().all()


shapes = st.tuples(st.integers(1, 19), st.integers(1, 140), st.integers(1, 80), st.integers(1, 40)).filter(
    lambda s: s[0] * s[1] * s[2] * s[3] < 200_000
)
FEW = settings(max_examples=14, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
MANY = settings(max_examples=2000, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))


def any_shape(shape: tuple[int, int, int, int], optional: bool, resets: bool, seed: int) -> None:
    torch.manual_seed(seed)
    reset_BL = torch.rand(shape[:2]) < 0.1 if resets else None
    compare_scan(make_inputs(shape, optional), delta_softplus=optional, reset_BL=reset_BL)


@FEW
@given(shapes, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_random_shapes(level: str, shape: tuple[int, int, int, int], optional: bool, resets: bool, seed: int) -> None:
    any_shape(shape, optional, resets, seed)


@pytest.mark.slow
@MANY
@given(shapes, st.booleans(), st.booleans(), st.integers(0, 2**31))
def test_2000_random_shapes(
    level: str, shape: tuple[int, int, int, int], optional: bool, resets: bool, seed: int
) -> None:
    any_shape(shape, optional, resets, seed)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("delta_BLE", (2, 5, 8), r"delta_BLE: expected shape \(B=2, L=5, E=7\), got \(2, 5, 8\)"),
        ("A_EN", (7,), r"A_EN: expected 2 dimensions, got shape \(7,\)"),
        ("u_BLE", (2, 0, 7), r"u_BLE: has no element, shape \(2, 0, 7\)"),
    ],
)
def test_shapes_that_do_not_fit(level: str, key: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match="selective_scan: " + message):
        selective_scan(**make_inputs((2, 5, 7, 3)) | {key: torch.randn(shape)})
