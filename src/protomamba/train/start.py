"""How a run begins: fresh, from given weights, or where a checkpoint stands. Decides what its flags then mean."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import Checkpoint
from protomamba.checkpoint.folder import LATEST, find_resumable
from protomamba.checkpoint.transformers_folder import read_transformers_folder
from protomamba.config import MAY_CHANGE, ArchitectureFields, ModelConfig, RunConfig, TrainConfig, flag
from protomamba.errors import ConfigError, UserError
from protomamba.model.registry import load_named, refuse_unnamed
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.trainer import Trainer, renamed_layers


@dataclass(frozen=True)
class Resumed:
    """The checkpoint a run goes on from, the configuration it then has, and what the user should know."""

    path: Path
    checkpoint: Checkpoint
    config: RunConfig
    further_steps: int | None  # train this many more, on a schedule of their own; None = to the recorded target
    warnings: list[str] = field(default_factory=list)


def load_named_code(config: RunConfig) -> None:
    """Import the layer and the head that the user named; those that only a checkpoint names stay unloaded."""
    for what in {"layer", "head"} & config.given:
        load_named(getattr(config, what), what)


def run_folder(config: RunConfig) -> Path:
    """Where the run is: --out-dir, or the folder of the checkpoint that --resume names."""
    if config.resume in (None, "auto") or "out_dir" in config.given:
        return config.out_dir
    return Path(str(config.resume)).parent


def find_resume(config: RunConfig) -> Resumed | None:
    """The checkpoint that --resume names, or finds (`auto`); None for a fresh start.

    Raises UserError for a path that is not there or not whole, ConfigError for flags that contradict the checkpoint.
    """
    if config.resume is None:
        return None
    if config.resume == "auto":
        found = find_resumable(config.out_dir)
        if found is None:
            return None
        return _resumed(config, found.path, found.checkpoint, found.warnings)
    path = Path(config.resume)
    return _resumed(config, path, checkpoint.load(path), [])


def _resumed(config: RunConfig, path: Path, loaded: Checkpoint, warnings: list[str]) -> Resumed:
    if "run" not in loaded.config or "stream" not in loaded.parts:
        raise UserError(
            f"{path}: holds no run to resume (the library saved it); start from its weights with --init-from {path}"
        )
    saved = RunConfig.recorded(loaded.config["run"])
    given = config.given
    contradictions = [
        f"{flag(name)}: the checkpoint has {getattr(saved, name)}, given {getattr(config, name)}"
        for name in RunConfig.model_fields
        if name in given and name not in MAY_CHANGE and getattr(config, name) != getattr(saved, name)
    ]
    if contradictions:
        raise ConfigError(
            f"{path}: contradicts the flags given; leave them out, or start a new run:\n  "
            + "\n  ".join(contradictions)
        )
    changes = {name: getattr(config, name) for name in given & MAY_CHANGE} | {"out_dir": run_folder(config)}
    further = changes.get("steps")
    if config.resume == "auto" and further == saved.steps:
        further = None  # the command line of the run itself, once more
    return Resumed(path, loaded, saved.replace(**changes), further, warnings)


def resume_trainer(resumed: Resumed) -> Trainer:
    """The trainer of the checkpoint, with `--steps N` laid as a new schedule over N further steps."""
    trainer = Trainer.from_checkpoint(resumed.checkpoint)
    if resumed.further_steps is not None:
        trainer.schedule_start, trainer.schedule_steps = trainer.step, resumed.further_steps
    return trainer


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from: a model shape, its tensors by our names, and the moments of a checkpoint that grows."""

    source: Path
    model: ModelConfig
    state: dict[str, Tensor]
    moments: dict[str, Any]


def read_initial_weights(path: Path) -> InitialWeights:
    """A protomamba checkpoint, or a folder of transformers' MambaForCausalLM. Raises UserError."""
    if not path.exists():
        raise UserError(f"--init-from {path}: there is no such checkpoint or folder")
    if path.is_dir() and not (path / LATEST).is_file():
        fields, state = read_transformers_folder(path)
        return InitialWeights(path, ModelConfig(**{"head": "softmax", **fields}), state, {})
    loaded = checkpoint.load(path)
    moments = loaded.parts.get("optimizer", {}).get("moments", {})
    return InitialWeights(path, ModelConfig(**loaded.config["model"]), loaded.parts["model"], moments)


def adapt_to_weights(config: RunConfig, weights: InitialWeights) -> RunConfig:
    """The run's configuration with the shape that `weights` have; ConfigError where a given flag contradicts it.

    The head is the run's own. Without --target-layers the model does not grow.
    """
    given = config.given
    refuse_unnamed(weights.model.layer, "layer")
    shape = {n: getattr(weights.model, n) for n in ArchitectureFields.model_fields if n not in _HEAD_FIELDS}
    shape |= {"vocab_size": weights.model.vocab_size, "base_layers": weights.model.n_layer}
    wrong = [
        f"{flag(name)}: the weights have {value}, given {getattr(config, name)}"
        for name, value in shape.items()
        if name in given and getattr(config, name) != value
    ]
    if wrong:
        raise ConfigError(f"--init-from {weights.source}: contradicts the flags given:\n  " + "\n  ".join(wrong))
    target = config.target_layers if "target_layers" in given else weights.model.n_layer
    return config.replace(**shape, target_layers=target)


_HEAD_FIELDS = ("head", "prototypes", "separation", "tie_embedding")


def fresh_trainer(config: RunConfig, vocab_size: int, weights: InitialWeights | None) -> tuple[Trainer, list[str]]:
    """Build, load, grow and freeze as the flags say; the second value is what the user should know about it."""
    shape = config.project(ModelConfig, vocab_size=vocab_size, n_layer=config.base_layers)
    model = SequenceModel(shape, seed=config.seed)
    notes, moments = _load_weights(model, weights) if weights else ([], {})
    origins: list[int | None] = list(range(config.base_layers))
    if config.final_layers != config.base_layers:
        with _naming_the_default(config, "placement", "append"):
            origins = model.grow(config.final_layers, config.placement, seed=config.seed + 1)
    with _naming_the_default(config, "freeze", "none"):
        model.freeze(config.freeze, config.freeze_embedding)
    trainer = Trainer(model, config.project(TrainConfig))
    if moments and config.final_layers != config.base_layers:
        trainer.optimizer.load_moments(renamed_layers(moments, origins))
        notes.append("the old layers keep their optimizer moments; the new ones start with none")
    return trainer, notes


@contextmanager
def _naming_the_default(config: RunConfig, name: str, instead: str) -> Iterator[None]:
    """An error about a value that is the documented default, which the user need not have given, says so."""
    try:
        yield
    except ConfigError as error:
        if name in config.given:
            raise
        raise ConfigError(f"{error}; it is the default: give {flag(name)} {instead}, or what you want") from None


def _load_weights(model: SequenceModel, weights: InitialWeights) -> tuple[list[str], dict[str, Any]]:
    """Loads what fits; what the user should know about it, and the moments of what was loaded."""
    same_head = weights.model.head == model.config.head and weights.model.classes == model.config.classes
    if same_head and model.config.tie_embedding and not weights.model.tie_embedding:
        raise ConfigError(f"--tie-embedding 1: {weights.source} has an embedding and a head of its own; leave it out")
    state, moments = (
        {k: v for k, v in each.items() if same_head or not k.startswith("head.")}
        for each in (weights.state, weights.moments)
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in (*missing, *unexpected) if not name.startswith("head.")]
    if lost:
        raise UserError(f"{weights.source}: does not fit the model: {', '.join(lost[:5])}")
    notes = [f"weights from {weights.source} ({weights.model.n_layer} layers)"]
    if not same_head:
        notes.append(f"its {weights.model.head} head is left out: the {model.config.head} head starts fresh")
    return notes, moments
