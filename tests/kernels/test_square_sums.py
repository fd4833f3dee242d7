"""square_sums: sums of squares of many tensors at once, which are finite exactly where the tensors are."""

from __future__ import annotations

import math

import pytest
import torch

from protomamba import kernels
from protomamba.kernels import native, reference

SIZES = (0, 1, 15, 16, 17, 2048, 4095, 4096, 4097, 40_000, 100_003)


def test_sums_agree_with_float64(level: str) -> None:
    tensors = [torch.randn(size) * 10 ** (i % 5 - 2) for i, size in enumerate(SIZES)]
    found = kernels.square_sums(tensors)
    for size, sum_, expected in zip(SIZES, found, reference.square_sums(tensors), strict=True):
        assert sum_ == pytest.approx(expected, rel=1e-6), size


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [s for s in SIZES if s])
def test_one_bad_element_anywhere_shows_in_its_tensor_alone(level: str, size: int, bad: float) -> None:
    for place in sorted({0, size // 3, size - 1}):
        tensors = [torch.zeros(size) for _ in range(3)]
        tensors[1][place] = bad
        before, poisoned, after = kernels.square_sums(tensors)
        assert before == after == 0.0 and not math.isfinite(poisoned), place


def test_what_is_finite_stays_finite(level: str) -> None:
    """The square of a float can be beyond all floats."""
    largest = torch.finfo(torch.float32).max
    (found,) = kernels.square_sums([torch.full((9_000,), largest)])
    assert found == pytest.approx(9_000 * largest**2)


def test_the_bits_do_not_depend_on_the_threads(library: native.Library) -> None:
    tensors = [torch.randn(size) for size in SIZES]
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(kernels.square_sums(tensors))
    assert found[0] == found[1] == found[2]


def test_other_tensors_take_the_reference_path(level: str) -> None:
    strided, wide = torch.randn(6, 8)[:, ::2], torch.randn(5, dtype=torch.float64)
    found = kernels.square_sums([torch.ones(3), strided, wide])
    assert found == pytest.approx([3.0, float(strided.square().sum()), float(wide.square().sum())])
    assert kernels.square_sums([]) == []


def test_parts_are_summed_as_tensors_of_their_own(level: str) -> None:
    tensors, parts = [torch.randn(5_000), torch.randn(300, 7), torch.randn(0)], [[1, 4_095, 904], [2_100], []]
    cut = [*tensors[0].split(parts[0]), tensors[1]]
    assert kernels.square_sums(tensors, parts) == kernels.square_sums(cut)
    assert reference.square_sums(tensors, parts) == reference.square_sums(cut)
    with pytest.raises(ValueError, match="parts"):
        kernels.square_sums(tensors, [[4_999], [2_100], []])
