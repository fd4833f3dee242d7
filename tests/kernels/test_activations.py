"""--activations bf16: a block keeps less for the backward pass; its output stays, its gradients stay close."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor

from protomamba.bits import differences
from protomamba.kernels import BlockState, mamba_block
from protomamba.kernels.cases import as_weights

from .closeness import assert_close
from .conftest import LEVELS
from .test_recompute import S, inputs

block = importlib.import_module("protomamba.kernels.mamba_block")  # whose name the op hides
native_only = pytest.mark.skipif(not LEVELS, reason="the reference path keeps what autograd keeps")
KINDS = pytest.mark.parametrize("compact", [False, True], ids=["mamba", "compact"])
MODES = pytest.mark.parametrize("recompute", ["none", "cheap", "blocks"])


def outcome(activations: str, compact: bool, recompute: str = "none") -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What the block gives, and the gradients of all its inputs."""
    given = {name: x.requires_grad_() for name, x in inputs(compact).items()}
    state = BlockState(given["conv_BKE"], given["ssm_BEN"])
    reset_BL = torch.rand(S.B, S.L) < 0.05
    out = mamba_block(
        given["x"], as_weights(given), state=state, return_state=True, reset_BL=reset_BL, recompute=recompute,
        activations=activations,
    )  # fmt: skip
    assert out.state is not None
    results = {"out": out.x_BLD, "conv": out.state.conv_BKE, "ssm": out.state.ssm_BEN}
    directions = [torch.randn_like(x) for x in results.values()]
    gradients = torch.autograd.grad(list(results.values()), list(given.values()), directions)
    return results, dict(zip(given, gradients, strict=True))


@native_only
@KINDS
@MODES
@pytest.mark.parametrize("large", [1, 10**9], ids=["in pieces", "whole"])
def test_the_output_stays_and_gradients_are_close(
    level: str, compact: bool, recompute: str, large: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block, "LARGE", large)
    exact, exact_gradients = outcome("fp32", compact, recompute)
    rounded, gradients = outcome("bf16", compact, recompute)
    assert not list(differences(rounded, exact))
    assert_close(gradients, exact_gradients, "kept in bf16", torch.float32)
    assert list(differences(gradients, exact_gradients))
    assert not list(differences(outcome("bf16", compact, recompute)[1], gradients))


@native_only
@KINDS
def test_what_is_kept_is_half(level: str, compact: bool) -> None:
    kept = {}
    for activations in ("fp32", "bf16"):
        given = {name: x.requires_grad_() for name, x in inputs(compact).items()}
        saved: dict[int, Tensor] = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(lambda x, s=saved: s.setdefault(x.data_ptr(), x), lambda x: x)
        with hooks:
            mamba_block(given["x"], as_weights(given), recompute="none", activations=activations)
        kept[activations] = sum(x.nbytes for x in saved.values() if x.shape[:2] == (S.B, S.L) or len(x) == S.B * S.L)
    assert kept["bf16"] < 0.51 * kept["fp32"]


def test_an_unknown_word_is_refused(level: str) -> None:
    given = inputs(False)
    with pytest.raises(ValueError, match="activations: expected one of fp32, bf16, got 'fp16'"):
        mamba_block(given["x"], as_weights(given), activations="fp16")
