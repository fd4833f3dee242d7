"""Everything `protomamba train` accepts, flat, one field a flag; and the presets, which are defaults below flags.

Only the command line and what turns it into parts know a RunConfig: what a run is made of takes its own configuration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from pydantic import Field

from protomamba.config import ArchitectureFields, TrainFields
from protomamba.schema import Schema


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
        description="labels for --token-file, each line of which is then one sequence: one label per line, or one per "
        "token; -100 = no label (.txt or .npy)",
    )
    val_label_file: Path | None = Field(None, description="labels for --val-token-file")
    n_class: int | None = Field(
        None, ge=1, le=16_777_216, description="number of classes in --label-file; auto = largest label + 1"
    )
    shard_ext: str = Field(
        "txt", title="EXT", pattern=r"^\.?[A-Za-z0-9_]{1,16}$", description="file extension of the shards in a folder"
    )
    vocab_size: int | None = Field(None, ge=1, le=16_777_216, description="vocabulary size; auto = largest token + 1")
    val_ratio: float = Field(
        0.05,
        ge=0,
        lt=1,
        description="fraction of the tokens (or sequences) to hold out where no validation data is given",
    )
    batch_size: int = Field(8, ge=1, le=1_000_000, description="rows per batch")
    seq_len: int = Field(
        64, ge=1, le=100_000_000, description="tokens per row; with --label-file, the longest sequence allowed"
    )
    shuffle_shards: bool = Field(True, description="a new order of the shards in each epoch")
    packed_sequences: bool = Field(
        False, description="each row continues where the one before it ended; 0 = windows in shuffled order"
    )
    eos_token: int | None = Field(
        None, ge=0, description="token that ends a document; not given = that of the prepared folder"
    )
    reset_at_eos: bool = Field(False, description="reset the state at the end of each document")
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
        description="defaults of the other flags. reference: those of the Rust crate that this succeeds (2 layers "
        "grown to 6, two frozen, backpropagation on every 32nd step). plain: backpropagation on every step, nothing "
        "grown or frozen. bytes, text, events, dna, classify: plain, with sizes and schedule derived from the data "
        "(with DATA, the one for its kind is the default)",
    )
    epochs: float | None = Field(
        None, gt=0, le=1e6, description="passes over the training data, instead of a number of steps"
    )
    time_budget: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[smh]$",
        title="TIME",
        description="wall time, instead of a number of steps: 90s, 20m or 8h; how many fit is measured at the start",
    )
    out_dir: Path = Field(Path("runs/"), description="run folder: checkpoints, metrics, configuration")
    resume: str | None = Field(
        None,
        title="PATH|auto",
        description="checkpoint to continue from; auto: the latest in --out-dir, if there is one",
    )
    init_from: Path | None = Field(None, description="initial weights: a checkpoint, or a transformers Mamba folder")
    save_every: int = Field(200, ge=1, description="steps between checkpoints")
    keep_last: int = Field(1, ge=0, le=10_000, description="numbered checkpoints to keep, besides the latest")
    on_save_error: Literal["stop", "continue"] = Field(
        "stop", description="if a checkpoint cannot be written: stop the run, or continue"
    )
    log_every: int = Field(20, ge=1, description="steps between lines of metrics")
    val_every: int = Field(200, ge=1, description="steps between validations")
    eval_batches: int = Field(8, ge=1, description="batches per validation, always the same ones")
    early_stopping_patience: int = Field(
        0, ge=0, description="validations without improvement before stopping (0 = off)"
    )
    callback: tuple[str, ...] = Field((), title="MODULE:CLASS", description="a callback of your own; repeatable")
    threads: int | None = Field(None, ge=1, le=1_024, description="number of torch's threads; auto = torch's choice")
    kernels: Literal["auto", "native", "reference"] = Field(
        "auto", description="native kernels, the slow reference implementation, or auto: native where available"
    )
    allow_mixed_ranks: bool = Field(
        False, description="torchrun: train even if ranks differ in something that changes the numbers"
    )
    progress: bool | None = Field(None, description="show a progress bar; auto = on a terminal")
    track: tuple[str, ...] = Field(
        (), title="NAME", description="also log the run to tensorboard, trackio or wandb; repeatable"
    )
    write_report: bool = Field(True, description="write report.html into the run folder at the end")


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


# Fields of a run that may differ between a checkpoint and the run that resumes it.
MAY_CHANGE = frozenset(
    {"steps", "log_every", "save_every", "val_every", "early_stopping_patience", "keep_last", "on_save_error"}
    | {"prefetch_workers", "prefetch_buffer", "threads", "kernels", "progress", "out_dir", "resume"}
    | {"callback", "epochs", "time_budget", "track", "write_report", "allow_mixed_ranks", "recompute"}
    # where the data lies may change; what it is may not, and is checked by its checksums
    | {"data", "token_file", "token_dir", "val_token_file", "val_token_dir", "label_file", "val_label_file"}
)


def is_unset(name: str, value: Any) -> bool:
    """Whether a value from a file or flag means None for this field."""
    optional = type(None) in get_args(RunConfig.model_fields[name].annotation)
    return optional and value in ("auto", "none") and name != "resume"
