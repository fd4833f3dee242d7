"""Native ops refuse what they would read outside of."""

from __future__ import annotations

import pytest
import torch

from protomamba import kernels
from protomamba.kernels.cases import CASES, Sizes

SIZES = Sizes(B=2, L=20, D=12, E=24, N=5)


@pytest.mark.parametrize("op", ["selective_scan", "causal_conv", "rms_norm", "prototype_loss", "softmax_loss"])
def test_a_tensor_without_data_is_refused_and_not_read(op: str) -> None:
    """A meta tensor's address is 0: given beside tensors with data it ended the process."""
    for name in list(CASES[op].inputs(SIZES))[1:]:
        inputs = CASES[op].inputs(SIZES)
        inputs[name] = inputs[name].to("meta")
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            CASES[op].call(kernels, inputs)


@pytest.mark.parametrize("outside", [29, -1, 2**31, 2**40, -(2**40), 2**63 - 1])
def test_a_sampled_class_that_is_none_is_refused(outside: int) -> None:
    inputs = CASES["separated_prototype_loss"].inputs(SIZES)
    inputs["sample_S"] = torch.cat([inputs["sample_S"][:-1], torch.tensor([outside])])
    with pytest.raises(ValueError, match="sample_S: expected classes from 0 to 28, found"):
        CASES["separated_prototype_loss"].call(kernels, inputs)
