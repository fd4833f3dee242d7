"""Asserts the tolerances of `kernels.closeness`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from protomamba.kernels.closeness import SMALLEST, TOLERANCES, rms_ratio


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, dtype: torch.dtype) -> None:
    """Every named tensor within the tolerance of this kind and dtype; all that are not are named, with their ratio."""
    assert actual.keys() == expected.keys()
    tolerance = TOLERANCES[kind, dtype]
    far = []
    for name, tensor in actual.items():
        assert tensor.shape == expected[name].shape, f"{name}: {tensor.shape} instead of {expected[name].shape}"
        ratio = rms_ratio(tensor, expected[name], SMALLEST)
        if not ratio <= tolerance:
            far.append(f"{name} {ratio:.1e}")
    assert not far, f"{kind} beyond {tolerance:.0e}: {', '.join(far)}"


def gradients(outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradient of sum(output * weight) with respect to each named input."""
    total = sum((out.double() * weight.double()).sum() for out, weight in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))
