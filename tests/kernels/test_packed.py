"""Matrices in bf16 and int8: what they are rounded to, and products with them against float64 of the rounded ones."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from protomamba.errors import ConfigError
from protomamba.kernels import DecodeStepper, LogitProjection, MambaStepper, native, reference
from protomamba.kernels.allocator import on_large_pages
from protomamba.kernels.packed import LARGEST, WEIGHTS, PackedMatrix, pack, unpack
from protomamba.kernels.reference import BlockWeights

from .closeness import assert_close
from .conftest import LEVELS
from .test_step import CLASSES, TOKENS, WIDTH, both_blocks, make_block, wide

every_kind = pytest.mark.parametrize("kind", WEIGHTS)
SHAPES = [(1, 1), (7, 3), (16, 64), (33, 130), (300, 513), (20, 5_000)]


def times(library: native.Library, x_TI: Tensor, packed: PackedMatrix) -> Tensor:
    y_TO = native.floats(len(x_TI), packed.shape[0])
    sizes = {"T": len(x_TI), "rows": packed.shape[0], "columns": packed.shape[1], "x_stride": x_TI.stride(0)}
    library.product(**sizes, kind=packed.kind, x=x_TI, w=packed.data, scale=packed.scale_O, y=y_TO)
    return y_TO


def rounded(weights: BlockWeights, kind: str) -> BlockWeights:
    return BlockWeights(
        *(unpack(pack(w, kind)) if w is not None and _is_matrix(n) else w for n, w in weights._asdict().items())
    )  # type: ignore[arg-type]


def _is_matrix(name: str) -> bool:
    return name.split("_")[1] == "proj"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_a_matrix_is_rounded_to(shape: tuple[int, int]) -> None:
    w_OI = torch.randn(shape) * torch.logspace(-20, 10, shape[0])[:, None]
    assert torch.equal(unpack(pack(w_OI, "fp32")), w_OI.double())
    assert torch.equal(unpack(pack(w_OI, "bf16")), w_OI.bfloat16().double())
    rows_OI, largest_O = unpack(pack(w_OI, "int8")), w_OI.abs().amax(1).double()
    assert torch.all((rows_OI - w_OI).abs().amax(1) <= 0.5001 * largest_O / LARGEST)
    torch.testing.assert_close(rows_OI.abs().amax(1), largest_O, rtol=1e-6, atol=0)


@every_kind
def test_rounding_twice_is_rounding_once_and_zeros_stay(kind: str) -> None:
    w_OI = torch.randn(13, 70)
    w_OI[4] = 0
    once = unpack(pack(w_OI, kind)).float()
    assert torch.equal(unpack(pack(once, kind)).float(), once) and not once[4].any()


def test_an_unknown_kind_is_an_error() -> None:
    with pytest.raises(ConfigError, match="weights: expected one of fp32, bf16, int8, got 'int4'"):
        pack(torch.ones(2, 2), "int4")


@every_kind
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 9])
def test_a_product_equals_its_twin(library: native.Library, kind: str, shape: tuple[int, int], T: int) -> None:
    x_TI, packed = torch.randn(T, shape[1]), pack(torch.randn(shape), kind)
    expected = reference.product(x_TI.double(), unpack(packed))
    assert_close(
        {"y": times(library, x_TI, packed)}, {"y": expected}, "int8" if kind == "int8" else "forward", torch.float32
    )


@every_kind
def test_a_row_has_the_same_bits_whatever_is_beside_it(library: native.Library, kind: str) -> None:
    x_TI, packed = torch.randn(11, 70), pack(torch.randn(37, 70), kind)
    together = times(library, x_TI, packed)
    for t in range(11):
        assert torch.equal(times(library, x_TI[t : t + 1], packed)[0], together[t])


@every_kind
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_broken_input_is_not_hidden(library: native.Library, kind: str, value: float) -> None:
    x_TI = torch.ones(2, 40)
    x_TI[1, 33] = value
    y_TO = times(library, x_TI, pack(torch.ones(9, 40), kind))
    assert y_TO[0].isfinite().all() and not y_TO[1].isfinite().any()


@both_blocks
@every_kind
@pytest.mark.parametrize("B", [1, 3, 70])
def test_a_decoder_with_packed_weights_equals_its_twin(level: str, compact: bool, kind: str, B: int) -> None:
    blocks = [make_block(B, 16, 3, 4, compact) for _ in range(3)]
    exact = [wide(rounded(weights, kind), state) for weights, state in blocks]
    embedding, norm, matrix = torch.randn(TOKENS, WIDTH), torch.randn(WIDTH), torch.randn(CLASSES, WIDTH)
    steppers = [MambaStepper(*block) for block in blocks]
    for stepper in steppers:
        stepper.pack(kind)
    decoder = DecodeStepper.of(embedding, steppers, norm, LogitProjection(matrix, True, 3.5), weights=kind)
    if not LEVELS or (kind == "fp32" and B == 70):
        assert decoder is None
        return
    assert decoder is not None
    scoring = LogitProjection(unpack(pack(matrix, kind)), True, 3.5)
    for _ in range(3):
        tokens_B = torch.randint(TOKENS, (B,))
        expected = reference.decode_step(tokens_B, embedding.double(), exact, norm.double(), scoring)
        tolerance = "int8 step" if kind == "int8" else "step"
        assert_close({"logits": decoder(tokens_B)}, {"logits": expected}, tolerance, torch.float32)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_without_native_kernels_a_step_takes_the_rounded_weights(kind: str) -> None:
    weights, state = (type(part)(*(x.double() for x in part)) for part in make_block(2, 4, 2, 4, False))
    expected_state = type(state)(*(x.clone() for x in state))
    stepper, x_BD = MambaStepper(weights, state), torch.randn(2, WIDTH).double()
    stepper.pack(kind)
    expected = reference.mamba_step(x_BD, rounded(weights, kind), expected_state)
    assert not stepper.native
    torch.testing.assert_close(stepper(x_BD), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["bf16", "int8"])
def test_any_number_of_threads_gives_the_same_bits(library: native.Library, kind: str) -> None:
    x_TI, packed, found = torch.randn(5, 512), pack(torch.randn(600, 512), kind), []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(times(library, x_TI, packed))
    torch.set_num_threads(1)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@pytest.mark.parametrize("sizes", [(1,), (0, 3), (5, 700_000, 3_000_001, 64)], ids=str)
def test_copies_on_large_pages_hold_the_same_and_overlap_nowhere(sizes: tuple[int, ...]) -> None:
    originals = [torch.randint(-127, 128, (size,)).to(torch.int8) for size in sizes] + [torch.randn(9, 3).bfloat16()]
    copies = on_large_pages(originals)
    assert all(torch.equal(copy, original) for copy, original in zip(copies, originals, strict=True))
    assert all(copy.data_ptr() % 64 == 0 for copy in copies if copy.numel())
    spans = [(copy.data_ptr(), copy.data_ptr() + copy.nbytes) for copy in copies]
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    del originals
    for number, copy in enumerate(copies):
        copy.fill_(number)
    assert all(bool((copy == number).all()) for number, copy in enumerate(copies))
