"""One measure of closeness and one table of tolerances. Loosening an entry needs its reason beside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

# RMS of the error over RMS of the float64 result.
TOLERANCES = {
    ("forward", torch.float64): 1e-12,
    ("gradient", torch.float64): 1e-11,
    ("forward", torch.float32): 2e-6,
    ("gradient", torch.float32): 2e-5,
    # One rounding to 8 bits of mantissa is at most 2^-8 = 4e-3 of an element, and some tensors have only one.
    ("forward", torch.bfloat16): 4e-3,
    ("gradient", torch.bfloat16): 4e-3,
    # One token of a block of random weights is five ops in a row on a few dozen numbers, some of which nearly cancel.
    ("step", torch.float32): 1e-5,
    # A block rounds its activations to bfloat16 at every seam, in both directions.
    ("block gradient", torch.bfloat16): 3e-2,
}


# The ratio says nothing of a sum that cancels. At B1-L1-E33-N1 the gradient of C is one number, 2.6e-4 out of terms
# whose sizes add up to 1.1: the kernel is off by 2e-8 of the terms, yet by 2.3e-5 of the number (the twin in float32 by
# 2.0e-5). The tests' inputs are of size 1, so below this the error itself is held, at 2e-7 for a gradient.
SMALLEST = 1e-2


def rms_ratio(actual: Tensor, expected: Tensor) -> float:
    """RMS(actual - expected) / RMS(expected), the latter at least SMALLEST."""
    actual, expected = actual.detach().double(), expected.detach().double()
    error = (actual - expected).square().mean().sqrt()
    return float(error / expected.square().mean().sqrt().clamp_min(SMALLEST))


def assert_close(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, dtype: torch.dtype) -> None:
    """Every named tensor within the tolerance of this kind and dtype; all that are not are named, with their ratio."""
    assert actual.keys() == expected.keys()
    tolerance = TOLERANCES[kind, dtype]
    far = []
    for name, tensor in actual.items():
        assert tensor.shape == expected[name].shape, f"{name}: {tensor.shape} instead of {expected[name].shape}"
        if tensor.numel() == 0:
            continue
        ratio = rms_ratio(tensor, expected[name])
        if not ratio <= tolerance:
            far.append(f"{name} {ratio:.1e}")
    assert not far, f"{kind} beyond {tolerance:.0e}: {', '.join(far)}"


def gradients(outputs: Sequence[Tensor], inputs: Mapping[str, Tensor], weights: Sequence[Tensor]) -> dict[str, Tensor]:
    """The gradient of sum(output * weight) with respect to each named input."""
    total = sum((out.double() * weight.double()).sum() for out, weight in zip(outputs, weights, strict=True))
    assert isinstance(total, Tensor)
    return dict(zip(inputs, torch.autograd.grad(total, list(inputs.values())), strict=True))
