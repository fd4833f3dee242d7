"""What the library takes: every field of a model and of its training, with default, bounds and help text.

`ModelConfig` and `TrainConfig` are made of the groups of fields below. `run_config.RunConfig`, everything that
`protomamba train` accepts, is made of the same groups, so that each default is written once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator

from protomamba.errors import ConfigError
from protomamba.schema import Schema

# The epsilon of every RMSNorm of a model; published Mamba checkpoints have the same.
NORM_EPS = 1e-5


# Options of parts as users write them: key -> value, or KIND -> {key: value}.
Options = dict[str, Any]


class StateSpaceFields(Schema):
    TITLE: ClassVar[str] = "model"

    d_state: int = Field(16, ge=1, le=1_024, description="state width N of each channel")
    d_conv: int = Field(4, ge=1, le=64, description="taps K of the causal convolution")


class InnerFields(Schema):
    TITLE: ClassVar[str] = "model"

    expand: int = Field(2, ge=1, le=16, description="inner width as a multiple of d_model (mamba layer)")
    dt_rank: int | None = Field(
        None, ge=1, le=65_536, description="rank of the time-step projection; auto = ceil(d_model / 16)"
    )


class PrototypeFields(Schema):
    TITLE: ClassVar[str] = "model"

    prototypes: Literal["learned", "fixed"] = Field(
        "learned", description="hpn head: learned prototypes, or fixed ones that are placed once"
    )
    separation: float = Field(
        20.0,
        ge=0,
        le=1e6,
        description="hpn head, learned prototypes: any value above 0 = the gradient of cross entropy (the size of the "
        "value is not used); 0 = the gradient of (1 - cos)^2, under which the prototypes collapse",
    )


class TieFields(Schema):
    TITLE: ClassVar[str] = "model"

    tie_embedding: bool = Field(False, description="softmax head: share one matrix with the embedding")


class PartFields(StateSpaceFields, InnerFields, PrototypeFields, TieFields):
    """Settings that have their own flag: a flag fills the field of that name in every part that declares it."""


class HeadFields(PrototypeFields, TieFields):
    TITLE: ClassVar[str] = "model"

    head: str = Field("hpn", description="hpn, softmax or package.module:Class")
    head_options: Options = Field({}, description="setting of the head; repeatable; a table in config files")


class LayerFields(StateSpaceFields, InnerFields):
    TITLE: ClassVar[str] = "model"

    layer: str = Field("mamba", description="mamba, compact, attention or package.module:Class")
    layers: str | None = Field(
        None,
        title="KIND[*N],...",
        description="layers by final index, such as mamba*3,attention; the pattern repeats up to the depth; instead "
        "of --layer",
    )
    layer_options: Options = Field(
        {}, description="setting of all layers or of one kind; repeatable; a table in config files"
    )


class InputFields(Schema):
    TITLE: ClassVar[str] = "model"

    input: str = Field("tokens", description="tokens, vector or package.module:Class")
    input_options: Options = Field({}, description="setting of the input; repeatable; a table in config files")


class ArchitectureFields(LayerFields, HeadFields, InputFields):
    TITLE: ClassVar[str] = "model"

    d_model: int = Field(512, ge=1, le=65_536, description="hidden width D")
    dropout: float = Field(0.0, ge=0, lt=1, description="dropout of the embedded input and of each layer's output")

    @field_validator("layer_options", "head_options", "input_options", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        return parse_options(value) if isinstance(value, list | tuple) else value

    def replace(self, **changes: Any) -> Self:
        """As `Schema.replace`; the options of a part that is replaced by another are dropped."""
        for what in ("head", "input"):
            if changes.get(what, getattr(self, what)) != getattr(self, what):
                changes.setdefault(f"{what}_options", {})
        return super().replace(**changes)

    @property
    def time_step_rank(self) -> int:
        """dt_rank, or its published default ceil(d_model / 16)."""
        return self.dt_rank or math.ceil(self.d_model / 16)

    def kinds(self, n_layer: int) -> list[str]:
        """The kind of each of `n_layer` layers, by index. ConfigError for an invalid pattern."""
        return stack_kinds(self.layers or self.layer, n_layer)


class ModelConfig(ArchitectureFields):
    """The shape of a SequenceModel: `vocab_size` tokens go in, `classes` scores come out."""

    vocab_size: int = Field(
        ge=1, le=16_777_216, description="vocabulary size: rows of the embedding, and classes of the head"
    )
    n_layer: int = Field(2, ge=0, le=10_000, description="layers")
    n_class: int | None = Field(
        None, ge=1, le=16_777_216, description="classes of the head, if they are not the tokens; auto = vocab_size"
    )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; other tools (peft) read a model's configuration by this method."""
        return self.model_dump(mode="json")

    @property
    def classes(self) -> int:
        return self.n_class or self.vocab_size


class TrainFields(Schema):
    TITLE: ClassVar[str] = "training"

    steps: int = Field(5_000, ge=1, le=1_000_000_000, description="training steps (with --resume: further steps)")
    seed: int = Field(42, ge=0, le=2**63 - 1, description="seed for initialisation and data order")
    lr: float = Field(1e-4, gt=0, le=10, description="AdamW learning rate")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="labelled sequences: balanced gives every class the same total weight in the loss"
    )
    sparse_rows: bool | None = Field(
        None,
        description="update only those rows of embedding and prototypes that a step uses; auto = for tables of 65,536 "
        "rows or more",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="how the learning rate decays; wsd: constant, then linear over the last fifth"
    )
    lr_warmup_steps: int | None = Field(
        None, ge=0, description="linear warm-up before the decay; auto = 2 % of the steps"
    )
    lr_min_scale: float = Field(
        0.1, ge=0, le=1, description="learning rate at the end of the decay, as a fraction of --lr"
    )
    optimizer: str = Field(
        "adamw", title="NAME", description="adamw, muon (hidden matrices; AdamW for the rest) or package.module:Class"
    )
    optimizer_option: tuple[str, ...] = Field((), title="KEY=VALUE", description="setting of the optimizer; repeatable")
    weight_decay: float = Field(0.01, ge=0, le=10, description="AdamW decoupled weight decay (matrices only)")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW decay of the second moment")
    adam_eps: float = Field(1e-8, gt=0, le=1, description="AdamW epsilon")
    grad_accum: int = Field(1, ge=1, le=100_000, description="micro-batches per update")
    grad_shards: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="groups of rows whose gradients are summed in a fixed order, so that the number of ranks does not "
        "change the result; auto = one per rank at the start (with --workers-outer, rounded up to a multiple of it)",
    )
    sync_every: int | None = Field(
        None,
        ge=1,
        description="for slow links: each worker trains alone for N steps, then all move by their mean change "
        "(DiLoCo); auto = gradients are shared at every step",
    )
    workers_outer: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="with --sync-every: number of workers; each has --grad-shards / N shards, whose gradients are "
        "shared at every step; auto = one worker per shard",
    )
    grad_clip_norm: float = Field(1.0, ge=0, description="global gradient norm to clip to (0 = off)")
    fail_on_non_finite: bool = Field(False, description="stop at NaN or Inf instead of skipping the update")
    ff_lr: float = Field(
        0.0, ge=0, le=10, description="learning rate of the Forward-Forward local updates of D (d_skip); 0 = off"
    )
    bp_cadence_steps: int = Field(
        1, ge=1, description="backpropagate on every Nth step; the local update runs on every step"
    )
    gradient_surgery_method: Literal["pcgrad", "gradnorm", "cagradstep"] = Field(
        "pcgrad", description="how a local gradient that conflicts with the global one is changed"
    )
    gradient_surgery_epsilon: float = Field(
        1e-8, ge=0, le=1, description="epsilon in the denominators of gradient surgery"
    )
    gradnorm_alpha: float = Field(0.2, ge=0, le=100, description="disagreement exponent of gradnorm")
    cagrad_lambda: float = Field(1.0, ge=0, le=100, description="conflict aversion of cagradstep")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="precision of the matrix products (the rest stays fp32)"
    )
    recompute: Literal["none", "cheap", "blocks"] = Field(
        "cheap",
        description="what the backward pass recomputes to save memory, with the same result to the bit: nothing, what "
        "is cheap and large, or everything inside a block (a third slower)",
    )
    activations: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="precision of what Mamba blocks keep for the backward pass; bf16 saves memory, but rounds "
        "gradients, and --recompute then changes bits",
    )


class TrainConfig(TrainFields):
    """How a Trainer updates a model. The defaults are those of `--preset plain`."""

    TITLE: ClassVar[str] = "training"


class Sampling(Schema):
    """How the next token is drawn from the head's calibrated distribution."""

    max_tokens: int = Field(200, ge=1, le=1_000_000_000, description="maximum number of new tokens")
    temperature: float = Field(0.8, ge=0, le=1_000, description="0 = always the most likely token (greedy)")
    top_k: int = Field(0, ge=0, description="sample from the N most likely tokens (0 = all)")
    top_p: float = Field(
        0.95, gt=0, le=1, description="sample from the most likely tokens that together have this probability (1 = all)"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed for sampling")


def pattern_kinds(pattern: str) -> list[str]:
    """The kinds in one repetition of a pattern: `mamba*3,attention` -> mamba, mamba, mamba, attention."""
    unit: list[str] = []
    for word in pattern.split(","):
        kind, star, count = word.strip().partition("*")
        if not kind or (star and not (count.isdecimal() and 0 < int(count) <= 10_000)):
            raise ConfigError(f"--layers {pattern}: expected KIND[*N],KIND[*N],..., found {word.strip() or 'nothing'}")
        unit += [kind.strip()] * int(count or 1)
    return unit


def stack_kinds(pattern: str, n_layer: int) -> list[str]:
    """The kind of each of `n_layer` layers: the pattern from layer 0 on, repeated, and cut to the depth."""
    unit = pattern_kinds(pattern)
    return [unit[index % len(unit)] for index in range(n_layer)]


def compact_pattern(pattern: str) -> str:
    """The same pattern with repeated kinds written as KIND*N."""
    runs = [(kind, len(list(same))) for kind, same in itertools.groupby(pattern_kinds(pattern))]
    return ",".join(kind if count == 1 else f"{kind}*{count}" for kind, count in runs)


def parse_options(words: Iterable[str]) -> Options:
    """`KEY=VALUE` and `KIND.KEY=VALUE` as {KEY: VALUE, KIND: {KEY: VALUE}}; the last value of a key counts."""
    options: Options = {}
    for word in words:
        path, equals, value = str(word).partition("=")
        kind, _, key = path.rpartition(".")
        if not equals or not key.isidentifier():
            raise ConfigError(f"option {word!r}: expected KEY=VALUE or KIND.KEY=VALUE")
        place = options.setdefault(kind, {}) if kind else options
        place[key] = value
    return options
