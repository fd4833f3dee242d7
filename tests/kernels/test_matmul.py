"""The product of two matrices against float64, and what its bits must not depend on."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from torch import Tensor

from protomamba.kernels import native
from protomamba.kernels.matmul import grad_input, grad_weight, linear, matmul

from .closeness import assert_close

# Tiles have 12 rows and 32 columns, or fewer; a piece of K is 512 long, a block of columns 128 or more.
SHAPES = [
    (1, 1, 1),
    (5, 3, 7),
    (12, 32, 16),
    (13, 33, 17),
    (30, 150, 40),
    (97, 31, 513),
    (24, 300, 1030),
    (2050, 40, 9),
]
turned = pytest.mark.parametrize(
    ("turn_a", "turn_b"), list(product((False, True), repeat=2)), ids=lambda turn: "t" if turn else "n"
)
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


def operands(shape: tuple[int, int, int], turn_a: bool, turn_b: bool) -> tuple[Tensor, Tensor]:
    """Random a and b as they lie in memory, their rows further apart than they are long."""
    M, N, K = shape
    a, b = (K, M) if turn_a else (M, K), (N, K) if turn_b else (K, N)
    return torch.randn(a[0], a[1] + 3)[:, :-3], torch.randn(b[0], b[1] + 5)[:, 5:]


def exact(a: Tensor, b: Tensor, turn_a: bool, turn_b: bool) -> Tensor:
    return (a.t() if turn_a else a).double() @ (b.t() if turn_b else b).double()


@shapes
@turned
def test_against_float64(
    level: str, library: native.Library, shape: tuple[int, int, int], turn_a: bool, turn_b: bool
) -> None:
    a, b = operands(shape, turn_a, turn_b)
    add = torch.randn(shape[0], shape[1] + 1)[:, 1:]
    found = {
        "alone": matmul(library, a, b, turn_a=turn_a, turn_b=turn_b),
        "added": matmul(library, a, b, turn_a=turn_a, turn_b=turn_b, add=add),
    }
    expected = exact(a, b, turn_a, turn_b)
    assert_close(found, {"alone": expected, "added": expected + add}, "forward", torch.float32)


@turned
def test_the_same_bits_on_any_number_of_threads(library: native.Library, turn_a: bool, turn_b: bool) -> None:
    a, b = operands((301, 270, 700), turn_a, turn_b)
    found = []
    for threads in (1, 2, 3, 4, 7):
        torch.set_num_threads(threads)
        found.append(matmul(library, a, b, turn_a=turn_a, turn_b=turn_b))
    assert all(torch.equal(found[0], other) for other in found[1:])


def test_a_row_has_the_same_bits_beside_any_others(library: native.Library) -> None:
    a, b = operands((90, 70, 600), False, True)
    whole = matmul(library, a, b, turn_b=True)
    for first, last in ((0, 1), (5, 30), (89, 90), (13, 90)):
        assert torch.equal(matmul(library, a[first:last], b, turn_b=True), whole[first:last])
        assert torch.equal(matmul(library, a, b[: last - 20], turn_b=True), whole[:, : last - 20]) or last < 21


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_stays_in_its_row_and_column(library: native.Library, bad: float) -> None:
    a, b = operands((40, 50, 20), False, False)
    clean = matmul(library, a, b)
    a[17, 3] = bad
    found = matmul(library, a, b)
    assert not found[17].isfinite().any()
    assert torch.equal(torch.cat([found[:17], found[18:]]), torch.cat([clean[:17], clean[18:]]))


@pytest.mark.parametrize("shape", [(0, 5, 4), (5, 0, 4), (5, 6, 0)], ids=str)
def test_nothing_to_multiply(library: native.Library, shape: tuple[int, int, int]) -> None:
    M, N, K = shape
    assert torch.equal(matmul(library, torch.randn(M, K), torch.randn(K, N)), torch.zeros(M, N))
    add = torch.randn(M, N)
    assert torch.equal(matmul(library, torch.randn(M, K), torch.randn(K, N), add=add), add)


@pytest.mark.parametrize("sizes", [(40, 24, 40), (300, 200, 8), (300, 8, 200), (1, 7, 9)], ids=str)
def test_the_products_of_a_layer(
    library: native.Library, monkeypatch: pytest.MonkeyPatch, sizes: tuple[int, int, int]
) -> None:
    """A gradient of many rows and few columns is made the other way round."""
    monkeypatch.setattr("protomamba.kernels.matmul.backend", lambda: "native")
    tokens, n_in, n_out = sizes
    x, w, dy = torch.randn(tokens, n_in), torch.randn(n_out, n_in), torch.randn(tokens, n_out)
    found = {"y": linear(x, w), "dx": grad_input(dy, w), "dw": grad_weight(dy, x)}
    x, w, dy = x.double(), w.double(), dy.double()
    assert_close(found, {"y": x @ w.t(), "dx": dy @ w, "dw": dy.t() @ x}, "forward", torch.float32)
