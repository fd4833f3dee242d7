"""Ops refuse in one line what they are not made for, and never read or write outside of what they are given."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from protomamba import kernels
from protomamba.kernels import AdamWTensors, DecodeStepper, LogitProjection, MambaStepper, native
from protomamba.kernels.arguments import OPS
from protomamba.kernels.cases import CASES, Inputs, Sizes, as_weights, block_state, block_weights
from protomamba.kernels.reference import BlockState

SIZES = Sizes(B=2, L=20, D=12, E=24, N=5)
EACH = [(op, name) for op in CASES for name in CASES[op].inputs(SIZES) if (op, name) != ("mamba_step", "reset_BL")]
# Of these any number of dimensions will do, or the case takes them apart before the op sees them.
ANY_DIMENSIONS = [
    ("rms_norm", "x_BLD"),
    ("add_rms_norm", "x_BLD"),
    ("add_rms_norm", "residual_BLD"),
    ("mamba_step", "x_BLD"),
]
WHOLE = ("targets_T", "sample_S", "reserved_R", "reset_BL")


def refused(op: str, inputs: Inputs) -> str:
    """The one line with which the op refuses."""
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)) as found:
        CASES[op].call(kernels, inputs)
    return str(found.value)


def given(op: str, name: str, change: Callable[[Tensor], Tensor]) -> Inputs:
    inputs = CASES[op].inputs(SIZES, torch.Generator().manual_seed(3))
    inputs[name] = change(inputs[name])
    return inputs


@pytest.mark.parametrize(("op", "name"), EACH)
def test_what_is_on_another_device_is_refused(op: str, name: str) -> None:
    """A meta tensor has no data: its address is 0, and read beside tensors with data it ended the process."""
    inputs = given(op, name, lambda x: x.to("meta"))
    message = refused(op, inputs)
    assert "\n" not in message


@pytest.mark.parametrize(("op", "name"), EACH)
def test_elements_of_another_kind_are_refused(op: str, name: str) -> None:
    wrong = [torch.complex64] + ([torch.float32] if name in WHOLE else [torch.int8, torch.int64, torch.bool])
    wrong += [torch.int64] if name == "reset_BL" else []
    for dtype in wrong:
        message = refused(op, given(op, name, lambda x, dtype=dtype: x.to(dtype)))  # type: ignore[misc]
        assert "\n" not in message and str(dtype) in message, (dtype, message)


@pytest.mark.parametrize(("op", "name"), EACH)
def test_another_number_of_dimensions_or_elements_is_refused(op: str, name: str) -> None:
    shapes: list[Callable[[Tensor], Tensor]] = [lambda x: x.new_empty(0)]
    if CASES[op].inputs(SIZES)[name].ndim:
        shapes += [lambda x: x[..., :0]] + ([] if (op, name) in ANY_DIMENSIONS else [lambda x: x[None]])
    for change in shapes:
        if (op, name) != ("mamba_step", "x_BLD") or change is not shapes[0]:
            assert "\n" not in refused(op, given(op, name, change))


def strided(x: Tensor) -> Tensor:
    """The same numbers, every other one of a larger memory that is full of NaN (of true, of the largest number)."""
    if x.ndim == 0:
        return x
    worst = torch.nan if x.is_floating_point() else True if x.dtype is torch.bool else torch.iinfo(x.dtype).max
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), worst, dtype=x.dtype)
    wide[..., ::2] = x
    return wide[..., ::2]


def turned(x: Tensor) -> Tensor:
    """The same numbers with the dimensions in the opposite order in memory."""
    backwards = tuple(reversed(range(x.ndim)))
    return x.permute(backwards).contiguous().permute(backwards)


def shifted(x: Tensor) -> Tensor:
    """The same numbers at an address that is no multiple of a vector's, or of anything but an element."""
    room = torch.empty(x.numel() + 1, dtype=x.dtype)
    return room[1:].view(x.shape).copy_(x)


def close(found: Tensor, expected: Tensor) -> None:
    """Other strides may lead to another kernel, so not the same bits; what lies between them is far off."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))


@pytest.mark.parametrize("change", [strided, turned, shifted])
@pytest.mark.parametrize("op", CASES)
def test_strides_change_no_number(op: str, change: Callable[[Tensor], Tensor]) -> None:
    plain = CASES[op].inputs(SIZES, torch.Generator().manual_seed(3))
    for expected, found in zip(
        CASES[op].call(kernels, plain),
        CASES[op].call(kernels, {name: change(x) for name, x in plain.items()}),
        strict=True,
    ):
        close(found, expected)


@pytest.mark.parametrize("op", CASES)
def test_one_number_expanded_to_a_whole_input_is_read_as_such(op: str) -> None:
    for name, x in CASES[op].inputs(SIZES).items():
        if x.is_floating_point() and x.ndim:
            expanded = given(op, name, lambda x: x.flatten()[0].expand(x.shape))
            for a, b in zip(
                CASES[op].call(kernels, expanded),
                CASES[op].call(kernels, {**expanded, name: expanded[name].contiguous()}),
                strict=True,
            ):
                close(a, b)


def test_integers_want_no_gradient() -> None:
    """torch's own refusal: an op cannot be given such a tensor."""
    with pytest.raises(RuntimeError, match="floating point"):
        torch.zeros(2, dtype=torch.int64).requires_grad_()


def test_a_lazily_negated_view_is_refused() -> None:
    """Its memory holds the opposite numbers."""
    assert "resolve_neg" in refused("rms_norm", given("rms_norm", "x_BLD", torch._neg_view))


def test_a_sparse_tensor_is_refused() -> None:
    assert "to_dense" in refused("product", given("product", "w_OI", lambda x: x.to_sparse()))


@pytest.mark.parametrize("outside", [29, -1, 2**31, 2**40, -(2**40), 2**63 - 1])
def test_a_sampled_class_that_is_none_is_refused(outside: int) -> None:
    inputs = CASES["separated_prototype_loss"].inputs(SIZES)
    inputs["sample_S"] = torch.cat([inputs["sample_S"][:-1], torch.tensor([outside])]).sort().values
    with pytest.raises(ValueError, match="sample_S: expected classes from 0 to 28, found"):
        CASES["separated_prototype_loss"].call(kernels, inputs)


def test_a_class_sampled_twice_is_refused() -> None:
    message = refused("separated_prototype_loss", given("separated_prototype_loss", "sample_S", lambda x: x[[0, 0]]))
    assert "rising order" in message or "log_chance_S" in message


# What is written in place


def updated(**other: Tensor) -> list[bool]:
    tensors = {name: torch.rand(70) for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq")}
    update = AdamWTensors(**tensors, step=torch.zeros(()), decay=0.1)._replace(**other)
    return kernels.adamw([update], lr=0.1, scale=1.0, beta1=0.9, beta2=0.99, eps=1e-8)


@pytest.mark.parametrize("pair", [("exp_avg", "exp_avg_sq"), ("parameter", "exp_avg"), ("parameter", "gradient")])
def test_an_update_of_tensors_that_share_memory_is_refused(pair: tuple[str, str]) -> None:
    room = torch.rand(139)
    with pytest.raises(ValueError, match="share no memory"):
        updated(**{pair[0]: room[:70], pair[1]: room[69:]})
    assert updated(**{pair[0]: torch.rand(140)[:70], pair[1]: torch.rand(140)[70:]}) == [False]


def test_an_update_with_a_tensor_elsewhere_is_refused() -> None:
    """A gradient on meta was read at the address 0."""
    for name in ("parameter", "gradient", "exp_avg", "exp_avg_sq"):
        with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
            updated(**{name: torch.rand(70, device="meta")})


def test_norms_of_a_tensor_elsewhere_are_refused() -> None:
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        kernels.square_sums([torch.rand(4), torch.rand(4, device="meta")])


def test_a_step_on_a_state_in_other_memory_is_refused() -> None:
    inputs = CASES["mamba_step"].inputs(SIZES)
    state = BlockState(inputs["conv_BKE"], inputs["ssm_BEN"])
    weights = as_weights(inputs)
    room = torch.rand(SIZES.B * SIZES.E * SIZES.N + 1)
    with pytest.raises(ValueError, match="memory of its own"):
        MambaStepper(
            weights, BlockState(room[: state.conv_BKE.numel()].view_as(state.conv_BKE), room[1:].view(2, 24, 5))
        )
    step = MambaStepper(weights, state)
    with pytest.raises(ValueError, match="which is written"):
        step(state.ssm_BEN.flatten()[: SIZES.B * SIZES.D].view(SIZES.B, SIZES.D))
    with pytest.raises(ValueError, match="is on meta"):
        step(torch.empty(SIZES.B, SIZES.D, device="meta"))


def test_tokens_that_are_no_integers_are_refused_in_decoding() -> None:
    sizes = Sizes(B=1, L=1, D=12, E=24, N=5)
    step = MambaStepper(as_weights(block_weights(sizes)), BlockState(**block_state(sizes)))
    scoring = LogitProjection(torch.rand(9, 12), unit=True, scale=1.0)
    decode = DecodeStepper.of(torch.rand(9, 12), [step], torch.ones(12), scoring)
    if decode is not None:
        with pytest.raises(ValueError, match="tokens_B: expected integers"):
            decode(torch.tensor([1.5]))


# Sizes beyond 32 bits


def test_sizes_are_handed_over_and_computed_in_64_bits() -> None:
    """By arithmetic: what a tensor of that size would need is not there."""
    if not native.available()[0]:
        pytest.skip("no native kernels")
    library = native._best()
    batch, length, width, states = 2**11, 2**13, 2**12, 16
    assert library.scan_chunk_floats(batch, length, width, states) >= batch * length // 64 * width * states > 2**32
    for op in OPS:
        kinds = {field.kind for field in library.fields(op)}
        assert kinds <= {"pool", "int", "float", "pointer", "view"}
        assert all(field.offset % 8 == 0 for field in library.fields(op)), op


@pytest.mark.slow
def test_more_than_2_to_the_31_elements() -> None:
    """4.3 GB of bfloat16: the input is one row that stands for all, only the output is real."""
    free = int(Path("/proc/meminfo").read_text().split("MemAvailable:")[1].split()[0]) * 1024
    if free < 8 << 30:
        pytest.skip(f"needs 8 GiB of free memory, found {free >> 30}")
    row = torch.randn(1024).bfloat16()
    length = 2**21 + 5
    assert length * 1024 > 2**31
    out = kernels.causal_conv(row.expand(1, length, 1024), torch.randn(1024, 1, 4))
    assert isinstance(out, Tensor)
    assert torch.equal(out[0, 3], out[0, -1]) and torch.equal(out[0, 2**21 - 1], out[0, 2**21])
