"""The whole model: embedding, residual stack, final norm, head. Grows, freezes, runs in chunks and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import cast, overload

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.config import NORM_EPS, ModelConfig
from protomamba.kernels.packed import check_weights
from protomamba.model.growth import frozen_layers, moved_freeze, new_positions
from protomamba.model.heads import HEADS
from protomamba.model.heads.base import Head
from protomamba.model.mixers.base import Block, ForwardContext, Norm, ResidualLayer, State, scale_output_init
from protomamba.model.mixers.mamba import LAYERS
from protomamba.model.registry import resolve

ModelState = list[State | None]
LayerHook = Callable[[int, Tensor], None]


class SequenceModel(nn.Module):
    """Tokens (B, L) -> loss, scores (B, L, classes) or predictions (B, L).

        x = embedding[tokens];  x = x + layer(norm(x)) for each layer;  z = norm_f(x);  head(z, targets) -> loss

    `seed` makes the initial weights a function of it alone; without one they come from torch's global generator.
    """

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config
        self.precision = "fp32"
        self.frozen: tuple[str, bool] = ("none", False)
        with _seeded(seed):
            self.embedding = nn.Embedding(config.vocab_size, config.d_model)
            nn.init.normal_(self.embedding.weight, std=0.02)
            self.layers = nn.ModuleList(self._new_block(config.n_layer) for _ in range(config.n_layer))
            self.norm_f = Norm(config.d_model)
            self.head: Head = resolve(config.head, HEADS, Head, "head")(config)
        if config.tie_embedding:
            self.head.tie_weights(cast(nn.Parameter, self.embedding.weight))

    def features(
        self,
        tokens_BL: Tensor,
        *,
        state: ModelState | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
        activation_hook: LayerHook | None = None,
        precision: str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """z (B, L, D), what the head sees, and the state after the last position (empty unless asked for).

        precision: of the matrix products, fp32 or bf16; None for that of the model, which a trainer sets.
        activation_hook: called with (layer index, u (B, L, E)) for each layer that has a trainable local weight.
        """
        ctx = ForwardContext(reset_BL, return_state, precision or self.precision)
        x_BLD: Tensor = self.embedding(tokens_BL)
        states: ModelState = []
        for index, block in enumerate(self.blocks()):
            layer_hook = (
                partial(activation_hook, index) if activation_hook and trainable(block.mixer.local_weight()) else None
            )
            x_BLD, layer_state = block(x_BLD, state[index] if state else None, ctx, layer_hook)
            states.append(layer_state)
        return self.norm_f(x_BLD), states if return_state else []

    @overload
    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        *,
        state: ModelState | None = ...,
        reset_BL: Tensor | None = ...,
        activation_hook: LayerHook | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        *,
        state: ModelState | None = ...,
        reset_BL: Tensor | None = ...,
        return_state: bool,
        activation_hook: LayerHook | None = ...,
    ) -> tuple[Tensor, ModelState]: ...

    def forward(
        self,
        tokens_BL: Tensor,
        targets_BL: Tensor,
        *,
        state: ModelState | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
        activation_hook: LayerHook | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """The loss, the mean over targets >= 0; with `return_state` also the state to go on from.

        tokens_BL: int64 (B, L); targets_BL: int64 (B, L), ignored where negative; reset_BL: bool (B, L), True where a
        document starts. A long sequence runs in chunks: pass each chunk's returned state to the next.
        """
        z_BLD, states = self.features(
            tokens_BL, state=state, reset_BL=reset_BL, return_state=return_state, activation_hook=activation_hook
        )
        loss: Tensor = self.head(z_BLD, targets_BL)
        return (loss, states) if return_state else loss

    @torch.no_grad()
    def scores(self, tokens_BL: Tensor) -> Tensor:
        """(B, L, classes): higher is likelier. The cosine to each prototype, or the logits of a softmax head."""
        return self.head.scores(self.features(tokens_BL)[0])

    @torch.no_grad()
    def predict(self, tokens_BL: Tensor) -> Tensor:
        """int64 (B, L): the class of the nearest prototype (of the highest score)."""
        return self.head.predict(self.features(tokens_BL)[0])

    @torch.no_grad()
    def decode_step(self, tokens_B: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """z (B, D) after one more token, and the state after it: the same numbers as `features` gives position by
        position (in fp32), at constant cost. Takes the state over: do not use the one passed in again."""
        x_BD: Tensor = self.embedding(tokens_B)
        states: ModelState = []
        for block, layer_state in zip(self.blocks(), state, strict=True):
            x_BD, layer_state = block.step(x_BD, layer_state)
            states.append(layer_state)
        return self.norm_f(x_BD), states

    def make_decode_fn(self, state: ModelState, weights: str = "fp32") -> Callable[[Tensor], Tensor]:
        """A function from tokens (B,) to `head.next_logits` (B, classes), for one position after another from `state`,
        which it takes over. What does not change is done once: the parameters must stay as they are meanwhile.

        weights: "fp32", "bf16" or "int8" (a scale a row), for the matrices of our own layers and, where every layer is
        one, of the head; all else stays in float32. ConfigError for another name.
        """
        check_weights(weights)
        steps = [block.stepper(layer_state) for block, layer_state in zip(self.blocks(), state, strict=True)]
        for step in steps:
            if isinstance(step, kernels.MambaStepper):
                step.pack(weights)
        scoring = self.head.logit_projection()
        if scoring is not None and _is_plain(self.embedding, nn.Embedding) and _is_plain(self.norm_f, Norm):
            embedding, norm = self.embedding.weight.detach(), self.norm_f.weight.detach()
            native = kernels.DecodeStepper.of(embedding, steps, norm, scoring, eps=NORM_EPS, weights=weights)
            if native is not None:
                return native

        @torch.no_grad()
        def advance(tokens_B: Tensor) -> Tensor:
            x_BD: Tensor = self.embedding(tokens_B)
            for step in steps:
                x_BD = step(x_BD)
            return self.head.next_logits(self.norm_f(x_BD))

        return advance

    def initial_state(self) -> ModelState:
        """The state before the first token, for any batch size."""
        return [None] * len(self.layers)

    def grow(self, target: int, placement: str = "append", seed: int | None = None) -> list[int | None]:
        """Grow to `target` layers; the outputs stay the same to the bit (new layers start with out_proj = 0).

        Returns for each final layer the index it had before, None for a new one. Raises ConfigError for a placement
        that does not fit. What is frozen stays so, at its new place; new layers train until `freeze` says otherwise.
        """
        base = len(self.layers)
        positions = set(new_positions(placement, base, target))
        with _seeded(seed):
            fresh = [self._new_block(target) for _ in positions]
        for block in fresh:
            block.zero_init_output()
        old, new = iter(enumerate(self.layers)), iter(fresh)
        origins: list[int | None] = []
        blocks: list[nn.Module] = []
        for final in range(target):
            origin, placed = (None, next(new)) if final in positions else next(old)
            origins.append(origin)
            blocks.append(placed)
        self.layers = nn.ModuleList(blocks)
        self.frozen = (moved_freeze(self.frozen[0], origins), self.frozen[1])
        self.config = self.config.replace(n_layer=target)
        return origins

    expand = grow  # its name before 0.2

    def freeze(self, policy: str = "none", embedding: bool = False) -> set[int]:
        """Keep the layers of `policy` (none, first:N, indices:i,j), and the embedding, from ever changing.

        Everything else is trainable again. Returns the frozen indices; ConfigError for a policy that does not fit.
        """
        frozen = frozen_layers(policy, len(self.layers))
        for index, layer in enumerate(self.layers):
            layer.requires_grad_(index not in frozen)
        self.embedding.requires_grad_(not embedding)
        self.frozen = (policy, embedding)
        return frozen

    def blocks(self) -> Iterator[Block]:
        for block in self.layers:
            assert isinstance(block, Block)
            yield block

    def parameter_count(self, trainable_only: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def _new_block(self, n_layer: int) -> Block:
        layer = resolve(self.config.layer, LAYERS, ResidualLayer, "layer")(self.config)
        if self.config.layer in LAYERS:
            scale_output_init(layer, n_layer)
        return Block(layer, self.config.d_model)


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is one of ours that nobody has replaced, derived from or hooked into."""
    return type(module) is kind and not module._forward_hooks and not module._forward_pre_hooks


def trainable(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Run a block on its own random stream, leaving the global one as it was; None = the global one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
