"""adamw against its twin in float64, on every path, and what it does where a moment is not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from protomamba import kernels
from protomamba.kernels import AdamWTensors, native, reference

from .closeness import assert_close

SIZES = (1, 15, 16, 255, 256, 257, 1000, 65_535, 65_536, 70_001)
SETTINGS = {"lr": 3e-3, "scale": 0.7, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8}


def tensors(sizes: tuple[int, ...] = SIZES) -> list[AdamWTensors]:
    return [
        AdamWTensors(
            torch.randn(size), torch.randn(size), torch.randn(size), torch.rand(size), torch.tensor(float(i)), 0.1 * i
        )
        for i, size in enumerate(sizes)
    ]


def wide(updates: list[AdamWTensors]) -> list[AdamWTensors]:
    return [AdamWTensors(*(x.double() for x in u[:4]), u.step.clone(), u.decay) for u in updates]  # type: ignore[union-attr]


def written(updates: list[AdamWTensors]) -> dict[str, Tensor]:
    return {
        f"{slot} {i}": getattr(u, slot)
        for i, u in enumerate(updates)
        for slot in ("parameter", "exp_avg", "exp_avg_sq")
    }


def test_updates_equal_the_twin(level: str) -> None:
    found = tensors()
    expected = wide(found)
    for _ in range(3):
        assert kernels.adamw(found, **SETTINGS) == [False] * len(SIZES)
        reference.adamw(expected, **SETTINGS)
    assert_close(written(found), written(expected), "forward", torch.float32)
    assert [float(u.step) for u in found] == [i + 3 for i in range(len(SIZES))]


def test_the_twin_is_torchs_adamw() -> None:
    parameter = torch.nn.Parameter(torch.randn(7, dtype=torch.float64))
    zero = torch.zeros(7, dtype=torch.float64)
    ours = AdamWTensors(parameter.detach().clone(), zero, zero.clone(), zero.clone(), torch.tensor(0.0), 0.1)
    theirs = torch.optim.AdamW([parameter], lr=3e-3, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    for _ in range(4):
        parameter.grad = torch.randn(7, dtype=torch.float64)
        reference.adamw([ours._replace(gradient=parameter.grad)], **{**SETTINGS, "scale": 1.0})
        theirs.step()
    torch.testing.assert_close(ours.parameter, parameter.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("slot", ["gradient", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_block_with_a_bad_moment_stays_as_it_is(level: str, slot: str, bad: float) -> None:
    size, block = 1000, reference.ADAMW_BLOCK
    updates = tensors((size, size))
    getattr(updates[1], slot)[300] = bad
    before = {name: x.clone() for name, x in written(updates).items()}
    assert kernels.adamw(updates, **SETTINGS) == [False, True]
    for name, x in written(updates).items():
        same = x.view(torch.int32) == before[name].view(torch.int32)
        if name.endswith("1"):
            assert same[block : 2 * block].all() and not same[:block].all() and not same[2 * block :].all(), name
        else:
            assert not same.all()


def test_the_bits_do_not_depend_on_the_threads(library: native.Library) -> None:
    results = []
    for threads in (1, 2, 4):
        torch.set_num_threads(threads)
        torch.manual_seed(5)
        updates = tensors()
        kernels.adamw(updates, **SETTINGS)
        results.append(written(updates))
    for other in results[1:]:
        assert all(torch.equal(x, other[name]) for name, x in results[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_other_tensors_take_the_reference_path(level: str, dtype: torch.dtype) -> None:
    (u,) = tensors((40,))
    narrow = AdamWTensors(*(x.to(dtype) for x in u[:4]), u.step, u.decay)  # type: ignore[union-attr]
    expected = wide([narrow])
    kernels.adamw([narrow], **SETTINGS)
    reference.adamw(expected, **SETTINGS)
    assert_close(written([narrow]), written(expected), "forward", dtype)


def test_strided_parameters_are_updated_in_place(level: str) -> None:
    (u,) = tensors((40,))
    turned = AdamWTensors(*(x.view(5, 8).clone().t() for x in u[:4]), u.step.clone(), u.decay)  # type: ignore[union-attr]
    kernels.adamw([turned, *tensors((3,))], **SETTINGS)
    kernels.adamw([u], **SETTINGS)
    torch.testing.assert_close(turned.parameter.t().flatten(), u.parameter, rtol=1e-6, atol=1e-7)


def test_a_graph_kept_over_an_update_fails_instead_of_going_wrong(level: str) -> None:
    weight = torch.randn(3, requires_grad=True)
    loss = (weight * weight).sum()
    (u,) = tensors((3,))
    kernels.adamw([u._replace(parameter=weight.detach())], **SETTINGS)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_shapes_that_do_not_fit(level: str) -> None:
    (u,) = tensors((3,))
    with pytest.raises(ValueError, match=r"adamw: expected .* of one shape, and a step, got \[\(3,\)"):
        kernels.adamw([u._replace(gradient=torch.ones(4))], **SETTINGS)
    assert kernels.adamw([], **SETTINGS) == []
