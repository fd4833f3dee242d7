"""A block keeps what it is told to and cuts large batches in pieces: never another bit by what is kept."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor

from protomamba.bits import differences
from protomamba.kernels import BlockState, mamba_block, reference
from protomamba.kernels.cases import Sizes, as_weights, block_state, block_weights

from .closeness import assert_close
from .conftest import LEVELS

block = importlib.import_module("protomamba.kernels.mamba_block")  # whose name the op hides
native_only = pytest.mark.skipif(not LEVELS, reason="the reference path keeps what autograd keeps")
S = Sizes(B=3, L=200, D=12, E=24, N=5, R=2)


def inputs(compact: bool) -> dict[str, Tensor]:
    torch.manual_seed(1)
    width = S.E if compact else S.D
    return {"x": torch.randn(S.B, S.L, width), **block_weights(S, compact), **block_state(S)}


def outcome(recompute: str, compact: bool, precision: str = "fp32", op: Any = mamba_block) -> dict[str, Tensor]:
    given = {name: x.requires_grad_() for name, x in inputs(compact).items()}
    reset_BL = torch.rand(S.B, S.L) < 0.05
    options = {} if op is reference.mamba_block else {"recompute": recompute}
    out = op(
        given["x"],
        as_weights(given),
        precision=precision,
        state=BlockState(given["conv_BKE"], given["ssm_BEN"]),
        return_state=True,
        reset_BL=reset_BL,
        want_u=True,
        **options,
    )
    results = {"out": out.x_BLD, "conv": out.state.conv_BKE, "ssm": out.state.ssm_BEN}
    directions = [torch.randn_like(x) for x in results.values()]
    gradients = torch.autograd.grad(list(results.values()), list(given.values()), directions)
    return {**results, "u": out.u_BLE, **{f"d {name}": g for name, g in zip(given, gradients, strict=True)}}


@native_only
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
@pytest.mark.parametrize("large", [1, 2 * 2 * 64 * 24, 10**9], ids=["parts of a row", "rows", "whole"])
def test_what_is_kept_changes_no_bit(
    level: str, compact: bool, precision: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "LARGE", large)
    expected = outcome("none", compact, precision)
    for recompute in ("cheap", "blocks"):
        assert not list(differences(outcome(recompute, compact, precision), expected))


@native_only
@pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
@pytest.mark.parametrize("large", [1, 2 * 24 * 70, 2 * 24 * 210], ids=["64 tokens", "a row in two", "single rows"])
def test_pieces_equal_the_twin(level: str, compact: bool, large: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = outcome("none", compact)
    monkeypatch.setattr(block, "LARGE", large)
    pieces = outcome("none", compact)
    assert pieces.keys() == whole.keys()
    forward = {name for name in whole if not name.startswith("d ")}
    assert_close(
        {name: pieces[name] for name in forward}, {name: whole[name] for name in forward}, "forward", torch.float32
    )
    rest = whole.keys() - forward
    assert_close({n: pieces[n] for n in rest}, {n: whole[n] for n in rest}, "gradient", torch.float32)


@native_only
def test_blocks_keeps_the_input_alone(level: str) -> None:
    kept: dict[str, int] = {}
    for recompute in ("none", "cheap", "blocks"):
        given = {name: x.requires_grad_() for name, x in inputs(False).items()}
        saved: list[Tensor] = []
        block_large = block.LARGE
        block.LARGE = S.B * S.L * S.E - 1
        try:
            with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x) or x, lambda x: x):
                mamba_block(given["x"], as_weights(given), recompute=recompute)
        finally:
            block.LARGE = block_large
        weights = sum(x.numel() for name, x in given.items() if name not in ("x", "conv_BKE", "ssm_BEN"))
        pointers = {x.data_ptr(): x.numel() for x in saved}
        kept[recompute] = sum(pointers.values()) - weights
    x = S.B * S.L * S.D
    assert kept["blocks"] < 1.1 * x < kept["cheap"] < 0.6 * kept["none"]


def test_an_unknown_word_is_refused(level: str) -> None:
    given = inputs(False)
    with pytest.raises(ValueError, match="recompute: expected one of none, cheap, blocks, got 'all'"):
        mamba_block(given["x"], as_weights(given), recompute="all")
