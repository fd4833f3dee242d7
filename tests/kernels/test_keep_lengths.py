"""keep_lengths against its definition in float64."""

from __future__ import annotations

import pytest
import torch

from protomamba.kernels import keep_lengths, reference

from .closeness import assert_close

SHAPES = [(1, 1), (7, 5), (40, 33), (300, 128)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("some", [False, True], ids=["all", "some rows"])
@pytest.mark.parametrize("own", [False, True], ids=["one length", "own lengths"])
def test_against_float64(level: str, shape: tuple[int, int], some: bool, own: bool) -> None:
    x_VD = torch.randn(shape)
    x_VD[shape[0] // 2] = 0.0
    rows_R = torch.randperm(shape[0])[: shape[0] // 2 + 1] if some else None
    lengths_V = torch.rand(shape[0] if rows_R is None else len(rows_R)) if own else None
    exact_VD, version = x_VD.double(), x_VD._version
    keep_lengths(x_VD, 2.5, lengths_V, rows_R)
    reference.keep_lengths(exact_VD, 2.5, None if lengths_V is None else lengths_V.double(), rows_R)
    assert_close({"x": x_VD}, {"x": exact_VD}, "forward", torch.float32)
    assert x_VD._version > version
    assert not bool(x_VD[shape[0] // 2].any())


def test_what_is_no_number_stays_in_its_row(level: str) -> None:
    x_VD = torch.randn(9, 20)
    clean_VD = x_VD.clone()
    x_VD[4, 3] = float("nan")
    for each in (x_VD, clean_VD):
        keep_lengths(each, 1.0)
    assert bool(x_VD[4].isnan().any())
    assert torch.equal(torch.cat([x_VD[:4], x_VD[5:]]), torch.cat([clean_VD[:4], clean_VD[5:]]))


def test_lengths_that_do_not_fit_are_refused(level: str) -> None:
    with pytest.raises(ValueError, match=r"lengths_V: expected \(9,\), got \(8,\)"):
        keep_lengths(torch.randn(9, 20), 1.0, torch.ones(8))
