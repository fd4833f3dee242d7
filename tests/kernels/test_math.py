"""exp, exp2, sigmoid and softplus of the kernels: the stated error holds over the whole range."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from protomamba.kernels.native import Library

# Units in the last place, stated in csrc/simd.h; sigmoid and softplus are built from exp and a division.
ULP = {"exp": 2.0, "exp2": 2.5, "sigmoid": 4.0, "softplus": 4.0}
RANGE = {"exp": (-87.3, 88.7), "exp2": (-126.0, 127.99), "sigmoid": (-87.0, 88.0), "softplus": (-87.0, 88.0)}
EXACT = {
    "exp": torch.exp,
    "exp2": torch.exp2,
    "sigmoid": lambda x: torch.where(x < 0, torch.exp(x), torch.ones_like(x)) / (1 + torch.exp(-x.abs())),
    "softplus": lambda x: x.clamp_min(0) + torch.log1p(torch.exp(-x.abs())),
}
BLOCK = 1 << 22


def bits(x: float) -> int:
    return int(torch.tensor(abs(x)).view(torch.int32))


def floats(low: float, high: float, stride: int) -> Iterator[Tensor]:
    """Every `stride`-th float32 of [low, high], by their bits: first those above 0, then those below."""
    for end, sign in ((high, 1.0), (low, -1.0)):
        for start in range(0, bits(end) + 1, BLOCK * stride):
            stop = min(start + BLOCK * stride, bits(end) + 1)
            yield torch.arange(start, stop, stride, dtype=torch.int32).view(torch.float32) * sign


def largest_error(library: Library, which: str, stride: int) -> float:
    worst = 0.0
    for x in floats(*RANGE[which], stride):
        exact = EXACT[which](x.double())
        ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1].clamp_min(-125) - 24)
        worst = max(worst, float(((library.map(which, x).double() - exact).abs() / ulp).max()))
    return worst


@pytest.mark.parametrize("which", list(ULP))
def test_a_sample_of_all_floats(library: Library, which: str) -> None:
    assert largest_error(library, which, stride=1009) <= ULP[which]


@pytest.mark.slow
@pytest.mark.parametrize("which", ["exp", "exp2"])
def test_every_float(library: Library, which: str) -> None:
    assert largest_error(library, which, stride=1) <= ULP[which]


def test_the_ends(library: Library) -> None:
    inf, nan = float("inf"), float("nan")
    x = torch.tensor([0.0, inf, -inf, nan, 1e30, -1e30])
    for which in ("exp", "exp2"):
        y = library.map(which, x)
        assert y[0] == 1.0 and y[1] == inf and y[4] == inf and y[3].isnan()
        assert 0.0 <= y[2] <= 2.0**-126 and 0.0 <= y[5] <= 2.0**-126
    assert library.map("sigmoid", x).tolist()[:3] == [0.5, 1.0, pytest.approx(0.0, abs=2.0**-126)]
    assert library.map("softplus", x[:2]).tolist() == [pytest.approx(0.6931471805599453), inf]
