"""The whole model: embedding, residual stack, final norm, head. Grows, freezes, runs in chunks and token by token."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn, TypeVar, cast, overload

import torch
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.errors import ConfigError, UserError
from protomamba.model.decode_fn import by_features, by_steps
from protomamba.model.growth import check_kinds, frozen_layers, moved_freeze, origins_of
from protomamba.model.heads import Head, head
from protomamba.model.inputs import Input, TokenEmbedding, input_part
from protomamba.model.mixers import Block, ForwardContext, mixer
from protomamba.model.mixers.base import Norm, State, scale_output_init
from protomamba.model.plain import is_plain
from protomamba.model.registry import with_settings

ModelState = list[State | None]
Result = TypeVar("Result")
LayerHook = Callable[[int, Tensor], None]


class SequenceModel(nn.Module):
    """Tokens (B, L) -> loss, scores (B, L, classes) or predictions (B, L).

        x = embedding[tokens];  x = x + layer(norm(x)) for each layer;  z = norm_f(x);  head(z, targets) -> loss

    `seed` makes the initial weights a function of it alone; without one they come from torch's global generator.
    """

    def __init__(self, config: ModelConfig, seed: int | None = None) -> None:
        super().__init__()
        self.config = config = with_settings(config)
        self.recompute = "cheap"
        self.activations = "fp32"
        self.frozen: tuple[str, bool] = ("none", False)
        with _seeded(seed):
            self.embedding: Input = input_part.find(config.input)(config)
            kinds = config.kinds(config.n_layer)
            self.layers = nn.ModuleList(self._new_block(kind, config.n_layer) for kind in kinds)
            self.norm_f = Norm(config.d_model)
            self.head: Head = head.find(config.head)(config)
        self.dropout = nn.Dropout(config.dropout)
        if config.tie_embedding:
            self.head.tie_weights(self._table())
        self.precision = "fp32"
        self._own_parameters = self._parameter_names()

    @property
    def precision(self) -> str:
        """Of the matrix products in layers and, in training, in the head: "fp32" or "bf16"."""
        return self._precision

    @precision.setter
    def precision(self, precision: str) -> None:
        self._precision = self.head.precision = precision

    @classmethod
    def from_pretrained(cls, path: str | Path) -> SequenceModel:
        """The model, in evaluation mode, of a checkpoint, a run folder (its latest), a folder that `save_pretrained`
        wrote, or a transformers Mamba folder. Raises UserError for anything else."""
        from protomamba.model.pretrained import load_pretrained

        return load_pretrained(Path(path))

    def save_pretrained(self, folder: str | Path) -> list[Path]:
        """Write weights and configuration alone (config.json, model.safetensors); returns the files. UserError where
        the model has been changed in a way that its configuration does not say, or the folder cannot be written."""
        from protomamba.model.pretrained import save_pretrained

        return save_pretrained(self, Path(folder))

    def features(
        self,
        inputs: Tensor,
        *,
        state: ModelState | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
        activation_hook: LayerHook | None = None,
        precision: str | None = None,
    ) -> tuple[Tensor, ModelState]:
        """z (B, L, D), what the head sees, and the state after the last position (empty unless asked for).

        precision: of the matrix products, fp32 or bf16; None for that of the model, which a trainer sets.
        torch.autocast changes nothing.
        activation_hook: called with (layer index, u (B, L, E)) for each layer that has a trainable local weight.
        """
        if torch.compiler.is_compiling():
            return uncompiled(SequenceModel.features)(
                self, inputs, state=state, reset_BL=reset_BL, return_state=return_state,
                activation_hook=activation_hook, precision=precision,
            )  # fmt: skip
        if torch.jit.is_tracing() or type(inputs).__module__ == "torch.fx.proxy":  # type: ignore[attr-defined, no-untyped-call]
            raise refused_to("A trace")
        x_BLD: Tensor = self.embedding(inputs)
        if x_BLD.ndim != 3:
            raise ValueError(f"expected {self.embedding.expected()}, got {inputs.dtype} of shape {tuple(inputs.shape)}")
        x_BLD = self.dropout(x_BLD)
        if state and len(state) != len(self.layers):
            raise ValueError(f"state: expected one entry per layer, {len(self.layers)} of them, got {len(state)}")
        precision, states = precision or self.precision, ModelState()
        for index, block in enumerate(self.blocks()):
            hooked = activation_hook is not None and trainable(block.mixer.local_weight())
            hook = partial(activation_hook, index) if hooked and activation_hook else None
            held = state[index] if state else None
            ctx = ForwardContext(held, reset_BL, return_state, precision, hook, self.recompute, self.activations)
            x_BLD, layer_state = block(x_BLD, ctx)
            states.append(layer_state)
        return self.norm_f(x_BLD), states if return_state else []

    @overload
    def forward(
        self,
        inputs: Tensor,
        targets_BL: Tensor | None = ...,
        *,
        state: ModelState | None = ...,
        reset_BL: Tensor | None = ...,
        activation_hook: LayerHook | None = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        inputs: Tensor,
        targets_BL: Tensor | None = ...,
        *,
        state: ModelState | None = ...,
        reset_BL: Tensor | None = ...,
        return_state: bool,
        activation_hook: LayerHook | None = ...,
    ) -> tuple[Tensor, ModelState]: ...

    def forward(
        self,
        inputs: Tensor,
        targets_BL: Tensor | None = None,
        *,
        state: ModelState | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
        activation_hook: LayerHook | None = None,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """The loss, the mean over targets >= 0; without targets the head's logits (B, L, classes), differentiable, or
        its scores where it has no logits. With `return_state` also the state from which the sequence continues.

        inputs: int64 tokens (B, L), or floating values (B, L, C) of `--input vector`; targets_BL: int64 (B, L), ignored
        where negative; reset_BL: bool (B, L), True where a document starts. A long sequence runs in chunks: pass each
        chunk's returned state to the next.
        """
        if torch.compiler.is_compiling():
            return uncompiled(SequenceModel.forward)(
                self, inputs, targets_BL, state=state, reset_BL=reset_BL, return_state=return_state,
                activation_hook=activation_hook,
            )  # fmt: skip
        z_BLD, states = self.features(
            inputs, state=state, reset_BL=reset_BL, return_state=return_state, activation_hook=activation_hook
        )
        if not isinstance(self.head, Head):
            raise TypeError(f"head is {type(self.head).__name__}: expected a Head; derive a class from protomamba.Head")
        result: Tensor | None = self.head.logits(z_BLD) if targets_BL is None else self.head(z_BLD, targets_BL)
        result = self.head.scores(z_BLD) if result is None else result
        return (result, states) if return_state else result

    @overload
    def scores(self, inputs: Tensor, *, state: ModelState | None = ..., reset_BL: Tensor | None = ...) -> Tensor: ...

    @overload
    def scores(
        self, inputs: Tensor, *, state: ModelState | None = ..., reset_BL: Tensor | None = ..., return_state: bool
    ) -> tuple[Tensor, ModelState]: ...

    @torch.no_grad()
    def scores(
        self,
        inputs: Tensor,
        *,
        state: ModelState | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """(B, L, classes): higher is likelier. The cosine to each prototype, or the logits of a softmax head.

        Continues from `state`; with `return_state` the second value is the state after the last position.
        """
        z_BLD, states = self.features(inputs, state=state, reset_BL=reset_BL, return_state=return_state)
        scores_BLV = self.head.scores(z_BLD)
        return (scores_BLV, states) if return_state else scores_BLV

    @overload
    def predict(self, inputs: Tensor, *, state: ModelState | None = ..., reset_BL: Tensor | None = ...) -> Tensor: ...

    @overload
    def predict(
        self, inputs: Tensor, *, state: ModelState | None = ..., reset_BL: Tensor | None = ..., return_state: bool
    ) -> tuple[Tensor, ModelState]: ...

    @torch.no_grad()
    def predict(
        self,
        inputs: Tensor,
        *,
        state: ModelState | None = None,
        reset_BL: Tensor | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, ModelState]:
        """int64 (B, L): the class of the nearest prototype (of the highest score). `state` as in `scores`."""
        z_BLD, states = self.features(inputs, state=state, reset_BL=reset_BL, return_state=return_state)
        classes_BL = self.head.predict(z_BLD)
        return (classes_BL, states) if return_state else classes_BL

    @torch.no_grad()
    def decode_step(self, inputs: Tensor, state: ModelState) -> tuple[Tensor, ModelState]:
        """z (B, D) after one more token (B,) or vector (B, C), and the state after it: the same numbers as `features`
        gives position by position (in fp32). Takes the state over: do not use the one passed in again."""
        x_BD: Tensor = self.dropout(self.embedding(inputs))
        states: ModelState = []
        for block, layer_state in zip(self.blocks(), state, strict=True):
            x_BD, layer_state = block.decode_step(x_BD, layer_state)
            states.append(layer_state)
        return self.norm_f(x_BD), states

    def make_decode_fn(self, state: ModelState, weights: str = "fp32") -> Callable[[Tensor], Tensor]:
        """A function from tokens (B,) to `head.next_logits` (B, classes), for one position after another from `state`,
        which it takes over. What does not change is done once: the parameters must stay as they are meanwhile.

        weights: "fp32", "bf16" or "int8" (a scale a row), for the matrices of our own layers and, where every layer is
        one, of the head; all else stays in float32. ConfigError for another name.
        """
        if type(self).features is not SequenceModel.features or "features" in vars(self):
            return by_features(self, state)
        return by_steps(self, state, weights)

    def initial_state(self) -> ModelState:
        """The state before the first token, for any batch size."""
        return [None] * len(self.layers)

    def stack_states(self, states: Sequence[ModelState]) -> ModelState:
        """The states of several sequences, in order, combined into the state of a batch."""
        stacked: ModelState = []
        for block, layer_states in zip(self.blocks(), zip(*states, strict=True), strict=True):
            present = [state for state in layer_states if state is not None]
            stacked.append(block.mixer.stack_states(present) if present else None)
        return stacked

    def unfused_reasons(self) -> dict[str, str]:
        """For each layer that runs module by module though its kind has a kernel for the whole block: why, by name.

        Such layers give the same within rounding and are slower; see Block.unfused_reason.
        """
        reasons = {f"layers.{index}": block.unfused_reason() for index, block in enumerate(self.blocks())}
        return {name: reason for name, reason in reasons.items() if reason is not None}

    def grow(
        self, target: int, placement: str = "append", seed: int | None = None, layers: str | None = None
    ) -> list[int | None]:
        """Grow to `target` layers; the outputs stay the same to the bit (new layers start with out_proj = 0).

        layers: kinds by final index, as in the configuration; None for the model's own pattern. Returns for each final
        layer the index it had before, None for a new one. Raises ConfigError for a placement that does not fit, and for
        an old layer that comes to a place of another kind. What is frozen stays so, at its new place; new layers train
        until `freeze` says otherwise.
        """
        origins = origins_of(placement, len(self.layers), target)
        config = self.config.replace(n_layer=target, **({"layers": layers} if layers else {}))
        check_kinds(self.config.kinds(len(self.layers)), config.kinds(target), origins)
        config = with_settings(config)
        with _seeded(seed):
            fresh = [
                self._new_block(kind, target, config)
                for kind, origin in zip(config.kinds(target), origins, strict=True)
                if origin is None
            ]
        for block in fresh:
            block.zero_init_output()
        new = iter(fresh)
        self.layers = nn.ModuleList(next(new) if origin is None else self.layers[origin] for origin in origins)
        self.frozen = (moved_freeze(self.frozen[0], origins), self.frozen[1])
        self.config = config
        self._own_parameters = self._parameter_names()
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

    def use_row_tables(self, wanted: Callable[[Tensor], bool]) -> dict[str, nn.Parameter]:
        """Let the tables that `wanted` chooses give row-sparse gradients, the others dense ones; the former by name.

        A table is the embedding, or the prototypes of a head that looks at a sample of its classes: what is trainable,
        not shared, and of which a step reads few rows.
        """
        chosen: dict[str, nn.Parameter] = {}
        for prefix, part in (("embedding", self.embedding), ("head", self.head)):
            # A class derived from one of ours may read its table in its own way: it inherits the name, and has none.
            table = getattr(part, str(vars(type(part)).get("row_table")), None)
            part.row_sparse = (
                isinstance(table, nn.Parameter)
                and table.requires_grad
                and not self.config.tie_embedding
                and part.reads_few_rows()
                and is_plain(part, type(part))
                and wanted(table)
            )
            if part.row_sparse:
                chosen[f"{prefix}.{part.row_table}"] = cast(nn.Parameter, table)
        return chosen

    def refuse_unbuildable(self) -> None:
        """UserError, naming the first, where parameters are not those the configuration builds: a checkpoint of such a
        model could not be loaded."""
        changed = sorted(self._parameter_names() ^ self._own_parameters)
        if changed:
            raise UserError(
                f"{changed[0]}: the model's parameters are not those that its configuration builds (an adapter, a "
                "parametrization, pruning, a layer taken out): a checkpoint of it could not be loaded. Merge or remove "
                "it first (torch's remove_parametrizations, prune.remove, peft's merge_and_unload), or keep "
                "model.state_dict() yourself"
            )

    def _parameter_names(self) -> frozenset[str]:
        return frozenset(name for name, _ in self.named_parameters())

    def blocks(self) -> Iterator[Block]:
        for index, block in enumerate(self.layers):
            if not isinstance(block, Block):
                raise TypeError(
                    f"layers.{index} is {type(block).__name__}: expected a Block; to leave a layer out, delete it from "
                    "model.layers, or zero what it adds: model.layers[i].zero_init_output()"
                )
            yield block

    def parameter_count(self, trainable_only: bool = False) -> int:
        return sum(p.numel() for p in self.parameters() if p.requires_grad or not trainable_only)

    def _new_block(self, kind: str, n_layer: int, config: ModelConfig | None = None) -> Block:
        config = config or self.config
        layer = mixer.find(kind)(config)
        if kind in mixer.classes:
            scale_output_init(layer, n_layer)
        return Block(layer, config.d_model, config.dropout)

    def __prepare_scriptable__(self) -> NoReturn:
        """What torch.jit.script asks for."""
        raise refused_to("torch.jit.script")

    def _table(self) -> nn.Parameter:
        """The embedding's matrix, to be shared. ConfigError where the inputs are no tokens."""
        if not isinstance(self.embedding, TokenEmbedding):
            raise ConfigError(f"--tie-embedding: --input {self.config.input} has no table of tokens to share")
        return cast(nn.Parameter, self.embedding.weight)


def trainable(parameter: nn.Parameter | None) -> bool:
    return parameter is not None and parameter.requires_grad


def refused_to(what: str) -> UserError:
    """The error for what would make another program of the model than Python runs."""
    return UserError(
        f"{what} cannot see into the kernels; protomamba export writes a checkpoint for other programs; within Python "
        "use the model itself or torch.compile(model)"
    )


def uncompiled(method: Callable[..., Result]) -> Callable[..., Result]:
    """A method that torch.compile leaves as it is, with all that it calls: the kernels are nothing it could see into.

    Only called while torch.compile runs, which has loaded its modules by then; they take a second.
    """
    if torch.compiler.is_exporting():
        raise refused_to("torch.export")
    left: Callable[..., Result] = torch.compiler.disable(method)  # type: ignore[no-untyped-call]
    return left


@contextmanager
def _seeded(seed: int | None) -> Iterator[None]:
    """Run a block on its own random stream, leaving the global one as it was; None = the global one."""
    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield
