"""mamba_block against its twin in float64, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba.kernels import BlockOutput, BlockState, BlockWeights, mamba_block, reference
from protomamba.kernels.cases import Sizes, as_weights, block_state, block_weights

from .closeness import assert_close
from .compare import compare

# B, L, D, N, R, K
Shape = tuple[int, int, int, int, int, int]
SHAPES = [(2, 63, 24, 16, 3, 4), (1, 130, 20, 5, 1, 3), (3, 2, 8, 4, 2, 4)]


def name(shape: tuple[int, ...]) -> str:
    return "-".join(f"{letter}{size}" for letter, size in zip("BLDNRK", shape, strict=True))


def sizes_of(shape: Shape, compact: bool) -> Sizes:
    B, L, D, N, R, K = shape
    return Sizes(B=B, L=L, D=D, E=D if compact else 2 * D, N=N, R=R, K=K)


def make_weights(shape: Shape, compact: bool) -> dict[str, Tensor]:
    return block_weights(sizes_of(shape, compact), compact)


def make_state(shape: Shape, compact: bool) -> BlockState:
    return BlockState(**block_state(sizes_of(shape, compact)))


def flat(output: BlockOutput) -> tuple[Tensor, ...]:
    assert output.state is not None
    return output.x_BLD, *output.state


def compare_block(shape: Shape, compact: bool) -> None:
    reset_BL = torch.rand(shape[:2]) < 0.1
    state = make_state(shape, compact)
    inputs = {
        "x": torch.randn(*shape[:3]),
        "conv": state.conv_BKE,
        "ssm": state.ssm_BEN,
        **make_weights(shape, compact),
    }

    def run(which: object, x: Tensor, conv: Tensor, ssm: Tensor, **weights: Tensor) -> tuple[Tensor, ...]:
        assert callable(which)
        return flat(which(x, as_weights(weights), state=BlockState(conv, ssm), return_state=True, reset_BL=reset_BL))

    compare(
        lambda **tensors: run(mamba_block, **tensors),
        lambda **tensors: run(reference.mamba_block, **tensors),
        inputs,
    )


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
def test_everything_given(level: str, shape: Shape, compact: bool) -> None:
    compare_block(shape, compact)


@pytest.mark.parametrize("shape", SHAPES, ids=name)
@pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
def test_bf16(level: str, shape: Shape, compact: bool) -> None:
    """Both sides in bfloat16 at the same seams: the values agree to float32, the gradients to their roundings."""
    weights = {key: w.requires_grad_() for key, w in make_weights(shape, compact).items()}
    x_BLD = torch.randn(*shape[:3], requires_grad=True)
    direction_BLD = torch.randn(*shape[:3])
    results = []
    for block in (mamba_block, reference.mamba_block):
        out_BLD = block(x_BLD, as_weights(weights), precision="bf16").x_BLD
        assert out_BLD.dtype == torch.float32
        gradients = torch.autograd.grad(out_BLD, [x_BLD, *weights.values()], direction_BLD)
        assert all(g.dtype == torch.float32 for g in gradients)
        results.append((out_BLD, dict(zip(["x", *weights], gradients, strict=True))))
    (actual, actual_gradients), (expected, expected_gradients) = results
    assert_close({"x": actual}, {"x": expected}, "forward", torch.bfloat16)
    assert_close(actual_gradients, expected_gradients, "block gradient", torch.bfloat16)


@pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
def test_in_pieces_equals_the_whole(level: str, compact: bool) -> None:
    shape = (2, 70, 12, 8, 2, 4)
    weights, x_BLD = as_weights(make_weights(shape, compact)), torch.randn(*shape[:3])
    whole = mamba_block(x_BLD, weights, return_state=True)
    first = mamba_block(x_BLD[:, :33], weights, return_state=True)
    second = mamba_block(x_BLD[:, 33:], weights, state=first.state, return_state=True)
    torch.testing.assert_close(torch.cat([first.x_BLD, second.x_BLD], 1), whole.x_BLD, rtol=1e-4, atol=1e-4)
    for a, b in zip(flat(second)[1:], flat(whole)[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_u_is_the_activation_that_D_multiplies(level: str) -> None:
    shape = (2, 9, 12, 8, 2, 4)
    weights, x_BLD = as_weights(make_weights(shape, False)), torch.randn(*shape[:3])
    u_BLE = mamba_block(x_BLD, weights, want_u=True).u_BLE
    expected = reference.mamba_block(x_BLD.double(), BlockWeights(*(w.double() for w in weights)), want_u=True).u_BLE
    assert u_BLE is not None and expected is not None and not u_BLE.requires_grad
    assert_close({"u": u_BLE}, {"u": expected}, "forward", torch.float32)
    assert mamba_block(x_BLD, weights).u_BLE is None


def test_frozen_weights_get_no_gradient_and_change_no_other(level: str) -> None:
    shape = (2, 9, 12, 8, 2, 4)
    weights, x_BLD = make_weights(shape, False), torch.randn(*shape[:3], requires_grad=True)
    trained = {key: w.clone().requires_grad_() for key, w in weights.items()}
    mamba_block(x_BLD, as_weights(trained)).x_BLD.square().sum().backward()
    whole = x_BLD.grad
    x_BLD.grad = None
    partly = {key: w.clone().requires_grad_(key in ("D_E", "x_proj_SE")) for key, w in weights.items()}
    mamba_block(x_BLD, as_weights(partly)).x_BLD.square().sum().backward()
    assert whole is not None and x_BLD.grad is not None and torch.equal(x_BLD.grad, whole)
    for key, w in partly.items():
        if w.requires_grad:
            assert w.grad is not None and torch.equal(w.grad, trained[key].grad)
        else:
            assert w.grad is None


def test_nothing_is_kept_without_gradients(level: str) -> None:
    shape = (2, 9, 12, 8, 2, 4)
    weights, x_BLD = make_weights(shape, False), torch.randn(*shape[:3])
    assert mamba_block(x_BLD, as_weights(weights)).x_BLD.grad_fn is None
    trained = as_weights({key: w.requires_grad_() for key, w in weights.items()})
    with torch.no_grad():
        assert mamba_block(x_BLD, trained).x_BLD.grad_fn is None


def test_a_wrong_precision_and_shapes_that_do_not_fit(level: str) -> None:
    shape = (2, 9, 12, 8, 2, 4)
    weights, x_BLD = make_weights(shape, False), torch.randn(*shape[:3])
    with pytest.raises(ValueError, match="precision: expected 'fp32' or 'bf16', got 'fp16'"):
        mamba_block(x_BLD, as_weights(weights), precision="fp16")
    with pytest.raises(ValueError, match=r"mamba_block: x_proj_SE: expected shape \(S=18, E=24\), got \(17, 24\)"):
        mamba_block(x_BLD, as_weights(weights | {"x_proj_SE": torch.randn(17, 24)}))
    del weights["in_proj_WD"]
    with pytest.raises(ValueError, match="without in_proj expected E = D, got E=24 D=12"):
        mamba_block(x_BLD, as_weights(weights))
