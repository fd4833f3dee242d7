"""A block as one native call has the bits of the same block op by op, its gradients too."""

from __future__ import annotations

from collections.abc import Collection

import pytest
import torch
from torch import Tensor

from protomamba import kernels
from protomamba.kernels import native, whole_block
from protomamba.kernels.cases import CASES, Sizes

SIZES = [
    Sizes(B=2, L=70, D=24, E=48, N=16),
    Sizes(B=1, L=1, D=3, E=5, N=1, R=1, K=1),
    Sizes(B=3, L=130, D=20, E=33, N=5, R=2, K=6),
]
blocks = pytest.mark.parametrize("name", ["mamba_block", "compact_block"])
sizes = pytest.mark.parametrize("s", SIZES, ids=lambda s: f"B{s.B}-L{s.L}-E{s.E}")


@pytest.fixture(autouse=True)
def products_of_our_own(library: native.Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("protomamba.kernels.matmul.backend", lambda: "native")
    monkeypatch.setattr("protomamba.kernels.whole_block.backend", lambda: "native")


def results(name: str, s: Sizes, without: Collection[str] = (), frozen: Collection[str] = ()) -> dict[str, Tensor]:
    """All outputs and gradients of a case, with inputs that are the same each time."""
    case = CASES[name]
    s = s if name == "mamba_block" else Sizes(**{**vars(s), "D": s.E})
    inputs = case.wanting(case.inputs(s, torch.Generator().manual_seed(5), without))
    for key in frozen:
        inputs[key].requires_grad_(False)
    outputs = case.call(kernels, inputs)
    directions = [torch.linspace(-1, 1, out.numel()).view(out.shape) for out in outputs]
    total = sum((out * d).sum() for out, d in zip(outputs, directions, strict=True))
    assert isinstance(total, Tensor)
    total.backward()  # type: ignore[no-untyped-call]
    grads = {f"d {key}": x.grad for key, x in inputs.items() if x.grad is not None}
    return {f"output {i}": out for i, out in enumerate(outputs)} | grads


def assert_same_bits(name: str, s: Sizes, **options: Collection[str]) -> None:
    called: list[bool] = []
    whole = results(name, s, **options)
    with whole_block.op_by_op():
        apart = results(name, s, **options)
        called.append(whole_block.possible(torch.float32))
    assert called == [False] and whole_block.possible(torch.float32)
    assert whole.keys() == apart.keys()
    assert [key for key in whole if not torch.equal(whole[key], apart[key])] == []


@blocks
@sizes
def test_with_states_and_resets(name: str, s: Sizes) -> None:
    assert_same_bits(name, s)


@blocks
@sizes
def test_alone(name: str, s: Sizes) -> None:
    assert_same_bits(name, s, without=CASES[name].optional)


@pytest.mark.parametrize(
    "frozen",
    [
        ("in_proj_WD", "x_proj_SE", "dt_proj_ER", "out_proj_DE"),
        ("norm_D", "x_BLD"),
        ("x_BLD",),
        ("A_log_EN", "D_E", "conv_weight_E1K"),
    ],
    ids=["products", "norm and x", "x", "the rest"],
)
def test_frozen_parts(frozen: tuple[str, ...]) -> None:
    assert_same_bits("mamba_block", SIZES[0], frozen=frozen)


def test_without_gradients_nothing_is_kept_and_u_is_given(library: native.Library) -> None:
    case, s = CASES["mamba_block"], SIZES[0]
    inputs = case.inputs(s, torch.Generator().manual_seed(5), case.optional)
    weights = kernels.BlockWeights(**{key: inputs[key] for key in kernels.BlockWeights._fields})
    found = kernels.mamba_block(inputs["x_BLD"], weights, want_u=True)
    with whole_block.op_by_op():
        expected = kernels.mamba_block(inputs["x_BLD"], weights, want_u=True)
    assert found.u_BLE is not None and expected.u_BLE is not None
    assert torch.equal(found.x_BLD, expected.x_BLD) and torch.equal(found.u_BLE, expected.u_BLE)


def test_the_same_bits_on_any_number_of_threads() -> None:
    found = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        found.append(results("mamba_block", Sizes(B=3, L=130, D=64, E=128, N=16, R=4)))
    for other in found[1:]:
        assert [key for key in other if not torch.equal(other[key], found[0][key])] == []
