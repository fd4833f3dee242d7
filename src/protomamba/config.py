"""The one schema of a run: every field with its default, bounds and help text.

`ModelConfig` and `TrainConfig` are what the library takes; `RunConfig` is everything `protomamba train` accepts, flat,
one field a flag. The three share their fields through the groups below, so that no default stands twice.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

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
        "learned", description="hpn head: prototypes that are learned, or placed once and fixed"
    )
    separation: float = Field(
        20.0,
        ge=0,
        le=1e6,
        description="hpn head, learned prototypes: 0 = the gradient of (1 - cos)^2 alone, which "
        "collapses; any other value = that of cross entropy, its size is unused",
    )


class TieFields(Schema):
    TITLE: ClassVar[str] = "model"

    tie_embedding: bool = Field(False, description="softmax head: share its matrix with the embedding")


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
        description="layers by final index, KIND[*N],...; the pattern repeats up to the depth; replaces --layer",
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
        None, ge=1, description="classes of the head, if they are not the tokens; auto = vocab_size"
    )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values; other tools (peft) read a model's configuration by this method."""
        return self.model_dump(mode="json")

    @property
    def classes(self) -> int:
        return self.n_class or self.vocab_size


class TrainFields(Schema):
    TITLE: ClassVar[str] = "training"

    steps: int = Field(5_000, ge=1, le=1_000_000_000, description="train steps (with --resume: further steps)")
    seed: int = Field(42, ge=0, le=2**63 - 1, description="seed for initialisation and data order")
    lr: float = Field(1e-4, gt=0, le=10, description="AdamW learning rate")
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="labelled sequences: balanced gives every class the same total weight in the loss"
    )
    sparse_rows: bool | None = Field(
        None,
        description="update only the touched rows of embedding and prototypes; auto = from 65,536 rows on",
    )
    schedule: Literal["cosine", "linear", "wsd", "constant"] = Field(
        "cosine", description="learning rate decay; wsd: constant, then decay over the last fifth"
    )
    lr_warmup_steps: int | None = Field(
        None, ge=0, description="linear warm-up before the decay; auto = 2 % of the steps"
    )
    lr_min_scale: float = Field(0.1, ge=0, le=1, description="floor of the cosine decay as a fraction of lr")
    optimizer: str = Field(
        "adamw", description="adamw, muon (hidden matrices; AdamW for the rest) or package.module:Class"
    )
    optimizer_option: tuple[str, ...] = Field((), description="a setting of the optimizer, KEY=VALUE; repeatable")
    weight_decay: float = Field(0.01, ge=0, le=10, description="AdamW decoupled weight decay (matrices only)")
    beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the first moment")
    beta2: float = Field(0.999, ge=0, lt=1, description="AdamW decay of the second moment")
    adam_eps: float = Field(1e-8, gt=0, le=1, description="AdamW epsilon")
    grad_accum: int = Field(1, ge=1, le=100_000, description="micro-batches per update")
    grad_shards: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="groups of rows whose gradients are added in one fixed order on any number of ranks; auto = one a "
        "rank at the start (with --workers-outer the next multiple of it)",
    )
    sync_every: int | None = Field(
        None,
        ge=1,
        description="for slow links: workers train alone for so many steps, then their mean moves all of them "
        "(DiLoCo); auto = all share every step",
    )
    workers_outer: int | None = Field(
        None,
        ge=1,
        le=65_536,
        description="with --sync-every: workers, of --grad-shards / N shards each, whose gradients they share at every "
        "step; auto = one a shard",
    )
    grad_clip_norm: float = Field(1.0, ge=0, description="global gradient norm to clip to (0 = off)")
    fail_on_non_finite: bool = Field(False, description="stop at NaN/Inf instead of skipping the update")
    ff_lr: float = Field(0.0, ge=0, le=10, description="Forward-Forward local learning rate of D (d_skip); 0 = off")
    bp_cadence_steps: int = Field(
        1, ge=1, description="backpropagate on every Nth step; the local update runs on every step"
    )
    gradient_surgery_method: Literal["pcgrad", "gradnorm", "cagradstep"] = Field(
        "pcgrad", description="how the local gradient yields to a conflicting global one"
    )
    gradient_surgery_epsilon: float = Field(
        1e-8, ge=0, le=1, description="epsilon in the divisions of gradient surgery"
    )
    gradnorm_alpha: float = Field(0.2, ge=0, le=100, description="disagreement exponent of gradnorm")
    cagrad_lambda: float = Field(1.0, ge=0, le=100, description="conflict aversion of cagradstep")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="matrix products in fp32 or bf16 (the rest stays fp32)"
    )
    recompute: Literal["none", "cheap", "blocks"] = Field(
        "cheap",
        description="what the backward pass makes again to save memory, with the same bits: nothing, what is cheap and "
        "large, or all inside a block (a third slower)",
    )
    activations: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="what Mamba blocks keep for the backward pass, in fp32, or in bf16 to save memory: gradients are "
        "then rounded, and --recompute changes bits",
    )


class TrainConfig(TrainFields):
    """How a Trainer updates a model. The defaults are those of `--preset plain`."""

    TITLE: ClassVar[str] = "training"


class GrowthFields(Schema):
    TITLE: ClassVar[str] = "growing and freezing"

    base_layers: int = Field(2, ge=0, le=10_000, description="layers before growing")
    target_layers: int | None = Field(
        None, ge=0, le=10_000, description="layers after growing; auto = --base-layers (no growth)"
    )
    placement: str = Field("append", description="append, prepend, insert:N or specific:i,j,... (final indices)")
    freeze: str = Field("none", description="none, first:N or indices:i,j,...")
    freeze_embedding: bool = Field(False, description="freeze the embedding table")


class DataFields(Schema):
    TITLE: ClassVar[str] = "data"

    data: Path | None = Field(None, description="prepared folder (protomamba prepare makes it)")
    token_file: Path | None = Field(None, description="token file: .txt, .bin or .npy")
    token_dir: Path | None = Field(None, description="folder of token shards")
    val_token_file: Path | None = Field(None, description="validation token file")
    val_token_dir: Path | None = Field(None, description="folder of validation shards")
    label_file: Path | None = Field(
        None,
        description="labels of --token-file, whose lines are then sequences: one a line, or one a token; -100 = none "
        "(.txt or .npy)",
    )
    val_label_file: Path | None = Field(None, description="labels of --val-token-file")
    n_class: int | None = Field(
        None, ge=1, le=16_777_216, description="classes of --label-file; auto = largest label + 1"
    )
    shard_ext: str = Field(
        "txt", pattern=r"^\.?[A-Za-z0-9_]{1,16}$", description="file extension of the shards in a folder"
    )
    vocab_size: int | None = Field(None, ge=1, le=16_777_216, description="vocabulary; auto = largest token + 1")
    val_ratio: float = Field(
        0.05, ge=0, lt=1, description="share of the tokens (or sequences) to hold out, if no validation data is given"
    )
    batch_size: int = Field(8, ge=1, le=1_000_000, description="rows per batch")
    seq_len: int = Field(
        64, ge=1, le=100_000_000, description="tokens per row; with --label-file, the longest sequence allowed"
    )
    shuffle_shards: bool = Field(True, description="new shard order each epoch")
    packed_sequences: bool = Field(
        False, description="each row continues where the one before it ended; 0 = windows in shuffled order"
    )
    eos_token: int | None = Field(
        None, ge=0, description="token that ends a document; without it the prepared folder's own"
    )
    reset_at_eos: bool = Field(False, description="the state does not cross a document's end")
    prefetch_workers: int = Field(0, ge=0, le=256, description="threads that read batches ahead (0 = none)")
    prefetch_buffer: int = Field(16, ge=1, le=100_000, description="maximum number of batches read ahead")


PresetName = Literal["reference", "plain", "bytes", "text", "events", "dna", "classify"]
DEFAULT_PRESET: PresetName = "reference"
# `plain` with sizes and schedule derived from the data, once that is open: see train/presets.py.
DATA_PRESETS = ("bytes", "text", "events", "dna", "classify")
# Defaults below a configuration file and flags, never counted as given. `plain` is the fields' own defaults.
PRESETS: dict[str, dict[str, Any]] = {
    # Those of the crate that this succeeds, whose command line this keeps.
    "reference": {
        "bp_cadence_steps": 32,
        "ff_lr": 1e-4,
        "lr_warmup_steps": 0,
        "grad_clip_norm": 0.0,
        "target_layers": 6,
        "placement": "specific:1,3,4,5",
        "freeze": "first:2",
        "packed_sequences": True,
    },
    "plain": {},
    **{name: {} for name in DATA_PRESETS},
}


class RunFields(Schema):
    TITLE: ClassVar[str] = "run"

    preset: PresetName = Field(
        DEFAULT_PRESET,
        description="defaults of the other flags: reference (the crate's: grown 2 to 6 layers, two frozen, "
        "backpropagation on one step in 32), plain (backpropagation on each step, nothing grown or frozen), or plain "
        "with sizes and schedule from the data: bytes, text, events, dna, classify (auto with DATA: its manifest's)",
    )
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the training data, instead of a number of steps"
    )
    time_budget: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[smh]$",
        description="wall time, instead of a number of steps: 90s, 20m or 8h; what fits is measured at the start",
    )
    out_dir: Path = Field(Path("runs/"), description="run folder: checkpoints, metrics, configuration")
    resume: str | None = Field(None, description="checkpoint to continue, or auto")
    init_from: Path | None = Field(None, description="initial weights: a checkpoint, or a transformers Mamba folder")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(1, ge=0, le=10_000, description="numbered checkpoints to keep besides latest")
    on_save_error: Literal["stop", "continue"] = Field(
        "stop", description="if a checkpoint cannot be written: stop the run, or continue"
    )
    log_every: int = Field(20, ge=1, description="steps between metric lines")
    val_every: int = Field(200, ge=1, description="steps between validations")
    eval_batches: int = Field(8, ge=1, description="batches per validation, always the same ones")
    early_stopping_patience: int = Field(
        0, ge=0, description="validations without improvement before stopping (0 = off)"
    )
    callback: tuple[str, ...] = Field((), description="a callback of your own, package.module:Class; repeatable")
    threads: int | None = Field(None, ge=1, le=1_024, description="torch's threads; auto = torch's choice")
    kernels: Literal["auto", "native", "reference"] = Field(
        "auto", description="native kernels, the slow reference, or auto: native where they work"
    )
    allow_mixed_ranks: bool = Field(
        False, description="torchrun: continue even if ranks differ in what determines the numbers"
    )
    progress: bool | None = Field(None, description="progress bar; auto = on a terminal")
    track: tuple[str, ...] = Field((), description="also log the run to tensorboard, trackio or wandb; repeatable")
    write_report: bool = Field(True, description="write report.html into the run's folder at the end")


class RunConfig(ArchitectureFields, TrainFields, GrowthFields, DataFields, RunFields):
    """Everything `protomamba train` takes; written resolved to config.json and into each checkpoint.

    What is not given comes from the preset, and what that leaves open from the fields' own defaults.
    """

    def __init__(self, **values: Any) -> None:
        preset = values.get("preset", "plain" if values.get("data") else DEFAULT_PRESET)
        super().__init__(**{"preset": preset, **PRESETS.get(str(preset), {}), **values})
        self._given = frozenset(values)

    @classmethod
    def default(cls, name: str) -> Any:
        """The value of a field where neither it nor a preset is given."""
        return PRESETS[DEFAULT_PRESET].get(name, super().default(name))

    @property
    def final_layers(self) -> int:
        """Layers after growing."""
        return self.base_layers if self.target_layers is None else self.target_layers

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")


class Sampling(Schema):
    """How the next token is drawn from the head's calibrated distribution."""

    max_tokens: int = Field(200, ge=1, le=1_000_000_000, description="maximum number of new tokens")
    temperature: float = Field(0.8, ge=0, le=1_000, description="0 = always the most likely token (greedy)")
    top_k: int = Field(0, ge=0, description="sample from the N most likely tokens (0 = all)")
    top_p: float = Field(
        0.95, gt=0, le=1, description="sample from the most likely tokens that together have this probability (1 = all)"
    )
    seed: int = Field(0, ge=0, le=2**63 - 1, description="seed for sampling")


# Fields of a run that may differ between a checkpoint and the run that resumes it (command-line.md).
MAY_CHANGE = frozenset(
    {"steps", "log_every", "save_every", "val_every", "early_stopping_patience", "keep_last", "on_save_error"}
    | {"prefetch_workers", "prefetch_buffer", "threads", "kernels", "progress", "out_dir", "resume"}
    | {"callback", "epochs", "time_budget", "track", "write_report", "allow_mixed_ranks", "recompute"}
    # where the data lies may change; what it is may not, and is checked by its checksums
    | {"data", "token_file", "token_dir", "val_token_file", "val_token_dir", "label_file", "val_label_file"}
)


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


def is_unset(name: str, value: Any) -> bool:
    """Whether a value from a file or flag means None for this field."""
    optional = type(None) in get_args(RunConfig.model_fields[name].annotation)
    return optional and value in ("auto", "none") and name != "resume"
