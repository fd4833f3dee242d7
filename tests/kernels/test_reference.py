"""The definitions themselves: gradients by finite differences in float64, and what is known in closed form."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import gradcheck

from protomamba.kernels import reference
from protomamba.kernels.cases import as_weights

from .test_block import make_state, make_weights


def leaf(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def test_gradcheck_of_the_scan() -> None:
    B, L, E, N = 2, 4, 3, 2
    reset_BL = torch.tensor([[False, False, True, False], [True, False, False, True]])
    tensors = (leaf(B, L, E), leaf(B, L, E), leaf(E, N), leaf(B, L, N), leaf(B, L, N))
    optional = (leaf(E), leaf(B, L, E), leaf(E))

    def scan(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.selective_scan(*x[:8], True, x[8], True, reset_BL))

    assert gradcheck(scan, (*tensors, *optional, leaf(B, E, N)))


def test_gradcheck_of_the_convolution() -> None:
    reset_BL = torch.tensor([[False, False, True, False, False]])

    def conv(*x: Tensor) -> tuple[Tensor, ...]:
        return tuple(reference.causal_conv(*x, True, reset_BL))

    assert gradcheck(conv, (leaf(1, 5, 3), leaf(3, 1, 4), leaf(3), leaf(1, 3, 3)))


def test_gradcheck_of_the_norms_and_losses() -> None:
    targets_T = torch.tensor([1, -1, 0, 2])
    assert gradcheck(reference.rms_norm, (leaf(2, 3, 4), leaf(4)))
    assert gradcheck(reference.add_rms_norm, (leaf(2, 3, 4), leaf(2, 3, 4), leaf(4)))
    assert gradcheck(lambda z, p: reference.prototype_loss(z, p, targets_T), (leaf(4, 5), leaf(3, 5)))
    assert gradcheck(lambda z, w: reference.softmax_loss(z, w, targets_T), (leaf(4, 5), leaf(3, 5)))


def test_a_constant_decay_sums_a_geometric_series() -> None:
    """u = delta = B = C = 1 and A = log(1/2): y_t = 1 + 1/2 + ... + 2^-t."""
    ones = torch.ones(1, 6, 1, dtype=torch.float64)
    y_BLE = reference.selective_scan(ones, ones, torch.tensor([[0.5]], dtype=torch.float64).log(), ones, ones)
    assert isinstance(y_BLE, Tensor)
    torch.testing.assert_close(y_BLE.flatten(), 2.0 - 0.5 ** torch.arange(6, dtype=torch.float64))


def test_the_convolution_is_torch_s() -> None:
    u_BLE, weight_E1K, bias_E = leaf(2, 9, 3), leaf(3, 1, 4), leaf(3)
    padded = torch.nn.functional.pad(u_BLE.transpose(1, 2), (3, 0))
    expected = torch.nn.functional.silu(torch.nn.functional.conv1d(padded, weight_E1K, bias_E, groups=3)).transpose(
        1, 2
    )
    torch.testing.assert_close(reference.causal_conv(u_BLE, weight_E1K, bias_E), expected)


def test_steps_equal_the_block() -> None:
    shape = (2, 6, 5, 3, 2, 4)
    weights = as_weights({key: w.double() for key, w in make_weights(shape, compact=False).items()})
    state = reference.BlockState(*(s.double() for s in make_state(shape, compact=False)))
    x_BLD = torch.randn(2, 6, 5, dtype=torch.float64)
    whole = reference.mamba_block(x_BLD, weights, state=reference.BlockState(*(s.clone() for s in state)))
    steps = torch.stack([reference.mamba_step(x_BLD[:, t], weights, state) for t in range(6)], 1)
    torch.testing.assert_close(steps, whole.x_BLD)
