"""Causal softmax attention (Vaswani et al. 2017, arXiv 1706.03762) with rotary positions (Su et al. 2021, 2104.09864).

Positions count from the document's start, and nothing is seen across one. Unlike a state-space mixer's, the state grows
with the text: keys and values of every token of the document so far, 2 D numbers a token and layer; the time of a step
grows likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.errors import ConfigError
from protomamba.model.mixers.base import PLAIN_CALL, ForwardContext, Mixer, MixerOutput, State, mixer
from protomamba.model.mixers.mamba import products_in
from protomamba.schema import Schema

HEAD_WIDTH = 64


class Cache(NamedTuple):
    """The document so far. keys, values: (B, H, S, W), H heads of width W, keys rotated. position_BS: int64, where in
    its document each stands, -1 where there is nothing to see (another document, or padding on the left). The last
    column is every row's newest token."""

    keys: Tensor
    values: Tensor
    position_BS: Tensor


@mixer("attention")
class Attention(Mixer):
    """in_proj -> q, k, v of every head -> rotary positions -> softmax(q k / sqrt(W)) v over the document -> out_proj.

    Memory of a training step: without resets and state that of torch's fused attention, O(L); else a mask (B, L, S).
    """

    class Config(Schema):
        n_head: int | None = Field(None, ge=1, le=4_096, description="heads; auto = d_model / 64, at least 1")
        rope_theta: float = Field(10_000.0, gt=1, description="base of the rotary wavelengths, in tokens")

    options: Config

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        width, count = config.d_model, self.options.n_head or default_heads(config.d_model)
        if width % count:
            raise ConfigError(f"--layer-option n_head={count}: expected a divisor of --d-model {width}")
        self.n_head, self.head_width = count, width // count
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def forward(self, x_BLD: Tensor, ctx: ForwardContext = PLAIN_CALL) -> MixerOutput:
        past = Cache(*ctx.state) if ctx.state is not None else None
        with products_in(ctx.precision):
            qkv_BLW = self.in_proj(x_BLD)
        query, key, value = (self._heads(each) for each in qkv_BLW.chunk(3, dim=-1))
        document_BL, position_BL = places(x_BLD, past, ctx.reset_BL)
        turn = rotation(position_BL, self.head_width, self.options.rope_theta, x_BLD.dtype)
        query, key = rotated(query, turn), rotated(key, turn)
        keys, values = key, value
        if past is not None:
            keys, values = torch.cat([past.keys, key], 2), torch.cat([past.values, value], 2)
        plain = past is None and ctx.reset_BL is None
        mask = None if plain else visible(document_BL, past)[:, None]
        y = F.scaled_dot_product_attention(query, keys, values, attn_mask=mask, is_causal=plain)
        with products_in(ctx.precision):
            y_BLD = self.out_proj(y.transpose(1, 2).flatten(2))
        state = kept(Cache(keys, values, _all_positions(document_BL, position_BL, past))) if ctx.return_state else None
        return MixerOutput(y_BLD.to(x_BLD.dtype), state)

    def stack_states(self, states: Sequence[State]) -> Cache:
        """Caches of different lengths, each filled up on the left with masked positions."""
        caches = [Cache(*state) for state in states]
        longest = max(cache.position_BS.shape[1] for cache in caches)
        padded = [_padded(cache, longest - cache.position_BS.shape[1]) for cache in caches]
        return Cache(*(torch.cat(parts) for parts in zip(*padded, strict=True)))

    def _heads(self, x_BLD: Tensor) -> Tensor:
        """(B, L, D) as (B, H, L, W)."""
        return x_BLD.view(*x_BLD.shape[:2], self.n_head, self.head_width).transpose(1, 2)


def default_heads(width: int) -> int:
    """The number of heads that divides the width and makes each about HEAD_WIDTH wide, of even width where it can."""
    wanted = max(1, width // HEAD_WIDTH)
    return next(count for count in range(wanted, 0, -1) if width % count == 0)


def places(x_BLD: Tensor, past: Cache | None, reset_BL: Tensor | None) -> tuple[Tensor, Tensor]:
    """For each token which document of this call it belongs to (B, L), 0 = the one that goes on from before, and its
    position in it (B, L)."""
    batch, length = x_BLD.shape[:2]
    index_L = torch.arange(length, device=x_BLD.device)
    before_B1 = index_L.new_zeros(batch, 1) if past is None else past.position_BS[:, -1:] + 1
    if reset_BL is None:
        return index_L.new_zeros(batch, length), before_B1 + index_L
    document_BL = reset_BL.long().cumsum(1)
    start_BL = torch.where(reset_BL, index_L, -before_B1).cummax(1).values
    return document_BL, index_L - start_BL


def visible(document_BL: Tensor, past: Cache | None) -> Tensor:
    """bool (B, L, S + L): whether a token sees another: an earlier one, or itself, of its own document."""
    length = document_BL.shape[1]
    causal_LL = torch.ones(length, length, dtype=torch.bool, device=document_BL.device).tril()
    seen_BLL = causal_LL & (document_BL[:, :, None] == document_BL[:, None, :])
    if past is None:
        return seen_BLL
    past_BLS = (document_BL == 0)[:, :, None] & (past.position_BS >= 0)[:, None, :]
    return torch.cat([past_BLS, seen_BLL], dim=2)


def _all_positions(document_BL: Tensor, position_BL: Tensor, past: Cache | None) -> Tensor:
    """position_BS of a cache with these tokens at its end: -1 for all that is not of the last one's document."""
    last_B1 = document_BL[:, -1:]
    now_BL = position_BL.masked_fill(document_BL != last_B1, -1)
    if past is None:
        return now_BL
    return torch.cat([past.position_BS.masked_fill(last_B1 != 0, -1), now_BL], dim=1)


def kept(cache: Cache) -> Cache:
    """The cache without the columns on its left that no row sees any more."""
    seen_S = (cache.position_BS >= 0).any(0)
    first = int(seen_S.int().argmax())
    if first == 0:
        return cache
    return Cache(cache.keys[:, :, first:], cache.values[:, :, first:], cache.position_BS[:, first:])


def _padded(cache: Cache, count: int) -> Cache:
    keys, values = (F.pad(part, (0, 0, count, 0)) for part in cache[:2])
    return Cache(keys, values, F.pad(cache.position_BS, (count, 0), value=-1))


def rotation(position_BL: Tensor, width: int, theta: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin (B, 1, L, W / 2) of position * theta^(-2 i / W), the angle of pair i; computed in float64."""
    pair_P = torch.arange(width // 2, dtype=torch.float64, device=position_BL.device)
    angle = position_BL[:, None, :, None] * theta ** (-2 * pair_P / max(1, width))
    return angle.cos().to(dtype), angle.sin().to(dtype)


def rotated(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    """x (B, H, L, W) with the pairs (i, i + W / 2) turned by their angles; the odd one of an odd width stays."""
    cos, sin = turn
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat([a * cos - b * sin, a * sin + b * cos, rest], dim=-1).to(x.dtype)
