"""mamba_step, decode_step and product, one position after another, against their twins in float64, on every path."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from protomamba.kernels import (
    BlockState,
    BlockWeights,
    DecodeStepper,
    LogitProjection,
    MambaStepper,
    mamba_step,
    product,
    reference,
)
from protomamba.kernels.cases import as_weights
from protomamba.kernels.mamba_step import STEP_ROWS
from protomamba.kernels.matmul import FEW_ROWS

from .closeness import assert_close
from .conftest import LEVELS
from .test_block import make_state, make_weights

TOKENS, CLASSES, WIDTH = 13, 37, 20
both_blocks = pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
every_batch = pytest.mark.parametrize("B", [1, 3, STEP_ROWS + 1])


def make_block(B: int, N: int, R: int, K: int, compact: bool) -> tuple[BlockWeights, BlockState]:
    shape = (B, 1, WIDTH, N, R, K)
    return as_weights(make_weights(shape, compact)), make_state(shape, compact)


def wide(weights: BlockWeights, state: BlockState) -> tuple[BlockWeights, BlockState]:
    exact = BlockWeights(*(None if w is None else w.double() for w in weights))  # type: ignore[arg-type]
    return exact, BlockState(*(s.double() for s in state))


@both_blocks
@every_batch
@pytest.mark.parametrize("N, R, K", [(16, 3, 4), (5, 1, 2), (40, 2, 3), (1, 2, 1)])
def test_steps_equal_the_twin(level: str, compact: bool, B: int, N: int, R: int, K: int) -> None:
    weights, state = make_block(B, N, R, K, compact)
    exact_weights, exact_state = wide(weights, state)
    stepper = MambaStepper(weights, state)
    for step in (stepper, stepper, lambda x_BD: mamba_step(x_BD, weights, state), stepper):
        x_BD = torch.randn(B, WIDTH)
        actual = {"x": step(x_BD), **state._asdict()}
        expected = {"x": reference.mamba_step(x_BD.double(), exact_weights, exact_state), **exact_state._asdict()}
        if K == 1:
            del actual["conv_BKE"], expected["conv_BKE"]
        assert_close(actual, expected, "step", torch.float32)


@both_blocks
@every_batch
@pytest.mark.parametrize("unit", [False, True])
def test_a_decoder_equals_its_twin(level: str, compact: bool, B: int, unit: bool) -> None:
    blocks = [make_block(B, 16, 3, 4, compact) for _ in range(3)]
    exact_blocks = [wide(*block) for block in blocks]
    embedding, norm, matrix = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH), torch.randn(CLASSES, WIDTH)
    decoder = DecodeStepper.of(
        embedding, [MambaStepper(*block) for block in blocks], norm, LogitProjection(matrix, unit, 3.5)
    )
    if B > STEP_ROWS or not LEVELS:
        assert decoder is None
        return
    assert decoder is not None
    for _ in range(4):
        tokens_B = torch.randint(TOKENS, (B,))
        expected = reference.decode_step(
            tokens_B, embedding.double(), exact_blocks, norm.double(), LogitProjection(matrix.double(), unit, 3.5)
        )
        assert_close({"logits": decoder(tokens_B)}, {"logits": expected}, "step", torch.float32)
    with pytest.raises(ValueError, match="tokens from 0 to 12"):
        decoder(torch.full((B,), TOKENS))


def test_a_block_of_another_kind_is_no_native_decoder(level: str) -> None:
    steps = [MambaStepper(*make_block(1, 4, 1, 4, False)), lambda x_BD: x_BD]
    scoring = LogitProjection(torch.randn(CLASSES, WIDTH), False, 1.0)
    assert DecodeStepper.of(torch.randn(TOKENS, WIDTH), steps, torch.ones(WIDTH), scoring) is None


@pytest.mark.parametrize("rows, columns", [(1, 1), (7, 3), (16, 64), (33, 130), (300, 513)])
@pytest.mark.parametrize("T", [1, 5, FEW_ROWS, FEW_ROWS + 1])
def test_a_product_equals_its_twin(level: str, T: int, rows: int, columns: int) -> None:
    x_TI, w_OI = torch.randn(T, columns), torch.randn(rows, columns)
    expected = reference.product(x_TI.double(), w_OI.double())
    assert_close({"y": product(x_TI, w_OI)}, {"y": expected}, "forward", torch.float32)


def test_a_product_has_a_gradient_where_one_is_wanted(level: str) -> None:
    x_TI, w_OI = torch.randn(2, 9, requires_grad=True), torch.randn(5, 9, requires_grad=True)
    dx_TI, dw_OI = torch.autograd.grad(product(x_TI, w_OI).sum(), (x_TI, w_OI))
    torch.testing.assert_close(dx_TI, w_OI.sum(0).expand(2, 9))
    torch.testing.assert_close(dw_OI, x_TI.sum(0).expand(5, 9))


def test_any_number_of_threads_gives_the_same_bits(level: str) -> None:
    results: list[Tensor] = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(7)
        shape = (2, 1, 256, 16, 16, 4)
        weights, state = as_weights(make_weights(shape, False)), make_state(shape, False)
        results.append(torch.cat([mamba_step(torch.randn(2, 256), weights, state).flatten(), state.ssm_BEN.flatten()]))
    torch.set_num_threads(2)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])
