"""The judge of exactness sees what an equality would let pass."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from protomamba.bits import differences, same

ONE = torch.tensor(1.0)
NAN = torch.tensor([math.nan])
OTHER_NAN = torch.tensor([0x7FC00001], dtype=torch.int32).view(torch.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (torch.tensor(0.0), torch.tensor(-0.0)),
        (0.0, -0.0),
        (torch.ones(3), torch.ones(3, dtype=torch.float64)),
        (torch.ones(1), torch.ones(3)),
        (torch.ones(3, 1), torch.ones(1, 3)),
        (ONE, torch.nextafter(ONE, torch.tensor(2.0))),
        (NAN, OTHER_NAN),
        (torch.tensor(True), torch.tensor(1, dtype=torch.uint8)),
        (1, 1.0),
        (True, 1),
        ([1], (1,)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"a": torch.zeros(2)}, {"a": torch.zeros(2), "b": 1}),
        (torch.zeros(0, 3), torch.zeros(0, 4)),
        (None, 0),
    ],
)
def test_what_is_not_the_same(one: Any, other: Any) -> None:
    assert not same({"x": [one]}, {"x": [other]})
    assert not same(other, one)
    assert next(differences({"x": [one]}, {"x": [other]})).startswith("x[0]")


@pytest.mark.parametrize(
    "value",
    [NAN, math.nan, torch.zeros(0), torch.randn(2, 3).t(), torch.arange(3).bfloat16(), {"a": [1, (2.5, None, "x")]}],
)
def test_what_is_the_same(value: Any) -> None:
    twin = value.clone() if isinstance(value, torch.Tensor) else value
    assert list(differences(value, twin)) == []


def test_the_first_difference_is_named() -> None:
    a = torch.zeros(4)
    b = a.clone()
    b[2] = 1.5
    assert list(differences({"w": {"x": a}}, {"w": {"x": b}})) == ["w.x: 1 of 4 elements, the first at 2: 0.0, not 1.5"]
