"""One position after another through a model: in one native call where every part is plain, else part by part."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from protomamba import kernels
from protomamba.config import NORM_EPS
from protomamba.kernels.packed import check_weights
from protomamba.model.inputs import TokenEmbedding
from protomamba.model.mixers.base import Norm, State
from protomamba.model.plain import any_global_hook, is_plain, passes_through

if TYPE_CHECKING:
    from protomamba.model.sequence_model import SequenceModel


def by_steps(model: SequenceModel, state: list[State | None], weights: str) -> Callable[[Tensor], Tensor]:
    """Every block by its stepper; see `SequenceModel.make_decode_fn`."""
    check_weights(weights)
    steps = [block.stepper(layer_state) for block, layer_state in zip(model.blocks(), state, strict=True)]
    for step in steps:
        if isinstance(step, kernels.MambaStepper):
            step.pack(weights)
    projection = model.head.logit_projection()
    if projection is not None and _ends_are_plain(model):
        embedding, norm = cast(Tensor, model.embedding.weight).detach(), model.norm_f.weight.detach()
        native = kernels.DecodeStepper.of(embedding, steps, norm, projection, eps=NORM_EPS, weights=weights)
        if native is not None:
            return native

    @torch.no_grad()
    def advance(tokens_B: Tensor) -> Tensor:
        x_BD: Tensor = model.dropout(model.embedding(tokens_B))
        for step in steps:
            x_BD = step(x_BD)
        return model.head.next_logits(model.norm_f(x_BD))

    return advance


def by_features(model: SequenceModel, state: list[State | None]) -> Callable[[Tensor], Tensor]:
    """By `features` on one position: for a model that has its own."""
    held = state

    @torch.no_grad()
    def advance(tokens_B: Tensor) -> Tensor:
        nonlocal held
        z_B1D, held = model.features(tokens_B[:, None], state=held, return_state=True, precision="fp32")
        return model.head.next_logits(z_B1D[:, 0])

    return advance


def _ends_are_plain(model: SequenceModel) -> bool:
    """Whether nothing but the blocks stands between a token and its logits that a kernel would not know."""
    plain = is_plain(model.embedding, TokenEmbedding) and is_plain(model.norm_f, Norm)
    return plain and is_plain(model.head, type(model.head)) and passes_through(model.dropout) and not any_global_hook()
