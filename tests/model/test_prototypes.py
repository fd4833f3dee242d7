"""Placement reaches the known optima, beats chance by the stated amounts, and is a function of its arguments alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from protomamba.model.heads import prototypes
from protomamba.model.heads.prototypes import code_prime, nearest_cosines, place


def cosines(points_VD: Tensor) -> Tensor:
    """(V, V) cosines with -1 on the diagonal, the plain way."""
    cosine_VV = points_VD.double() @ points_VD.double().t()
    return cosine_VV.fill_diagonal_(-1.0)


@pytest.mark.parametrize(
    ("count", "width"), [(2, 1), (3, 2), (2, 7), (5, 8), (9, 8), (64, 128), (128, 128), (129, 128)]
)
def test_up_to_width_plus_one_it_is_the_simplex(count: int, width: int) -> None:
    cosine_VV = cosines(place(count, width))
    others = cosine_VV[~torch.eye(count, dtype=torch.bool)]
    assert (others + 1 / (count - 1)).abs().max() < 1e-6


@pytest.mark.parametrize(("count", "width"), [(10, 8), (13, 8), (16, 8), (130, 128), (200, 128), (256, 128), (65, 33)])
def test_up_to_twice_the_width_no_cosine_is_positive(count: int, width: int) -> None:
    points_VD = place(count, width)
    assert cosines(points_VD).max().abs() < 1e-6
    assert points_VD.sum(0).abs().max() < 1e-5, "simplexes are centred"


@pytest.mark.parametrize(
    ("count", "width", "largest"), [(257, 128, 0.06), (300, 33, 0.36), (17, 8, 0.2), (40, 8, 0.33)]
)
def test_beyond_that_descent_finds_good_codes(count: int, width: int, largest: float) -> None:
    assert cosines(place(count, width)).max() < largest


@pytest.mark.parametrize(("count", "width", "degree"), [(2500, 128, 2), (4000, 64, 3), (3000, 33, 3)])
def test_a_large_code_keeps_the_bound_of_weil(
    count: int, width: int, degree: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(prototypes, "POLISH_BUDGET", 0.0)
    bound = (degree - 1) / math.sqrt(code_prime(width))
    points_VD = place(count, width)
    assert cosines(points_VD).max() <= bound + 1e-6
    random_VD = torch.nn.functional.normalize(
        torch.randn(count, width, generator=torch.Generator().manual_seed(1)), dim=1
    )
    assert cosines(points_VD).max() < 0.8 * cosines(random_VD).max()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 200), st.integers(1, 40))
def test_any_size_gives_unit_vectors_and_leaves_the_global_generator_alone(count: int, width: int) -> None:
    before = torch.get_rng_state()
    points_VD = place(count, width)
    assert points_VD.shape == (count, width) and points_VD.dtype == torch.float32
    assert (points_VD.norm(dim=1) - 1).abs().max() < 1e-5
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(points_VD, place(count, width))
    if width > 5:
        assert count == 1 or nearest_cosines(points_VD).max() < 0.99, "no two classes share a prototype"


def test_the_seed_and_only_the_seed_turns_the_simplex() -> None:
    assert not torch.allclose(place(9, 8, seed=1), place(9, 8, seed=2))


@pytest.mark.parametrize(("count", "width"), [(129, 128), (257, 32), (3000, 16)])
def test_the_number_of_threads_changes_nothing(count: int, width: int) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = place(count, width)
        torch.set_num_threads(3)
        assert torch.equal(alone, place(count, width))
    finally:
        torch.set_num_threads(threads)


def test_on_the_meta_device_nothing_is_computed() -> None:
    with torch.device("meta"):
        assert place(1_000_000, 512).is_meta


def test_nearest_cosines_in_blocks_equal_the_plain_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    points_VD = torch.randn(101, 6, generator=torch.Generator().manual_seed(0))
    plain_V = cosines(torch.nn.functional.normalize(points_VD, dim=1)).amax(1).float()
    monkeypatch.setattr(prototypes, "BLOCK_COSINES", 7 * 101)
    assert torch.allclose(nearest_cosines(points_VD), plain_V, atol=1e-6)
    some = nearest_cosines(points_VD, sample=10)
    assert len(some) == 10 and torch.allclose(some, plain_V[torch.arange(10) * 101 // 10], atol=1e-6)
    assert nearest_cosines(points_VD[:1]).tolist() == [-1.0]
