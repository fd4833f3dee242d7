"""Which checkpoint a run resumes from, and what the flags given with it may change."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import Resumable, find_resumable
from protomamba.config import ModelConfig, stack_kinds
from protomamba.errors import ConfigError, UserError
from protomamba.run_config import MAY_CHANGE, RunConfig
from protomamba.schema import flag


@dataclass(frozen=True)
class Resumed:
    """The checkpoint a run resumes from, and the configuration it then has."""

    found: Resumable
    config: RunConfig
    further_steps: int | None  # train this many more, on a schedule of their own; None = to the recorded target
    new_length: bool = False  # whether --epochs or --time-budget was given, for further steps


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
        return resume_from(config, found) if found else None
    path = Path(config.resume)
    return resume_from(config, Resumable(path, checkpoint.load(path)))


def resume_from(config: RunConfig, found: Resumable) -> Resumed:
    """The run of a checkpoint with the flags given beside it; see `find_resume`."""
    path, loaded = found.path, found.checkpoint
    if "run" not in loaded.config or "stream" not in loaded.parts:
        raise UserError(
            f"{path}: contains no run to resume (it was saved by the library); start from its weights with "
            f"--init-from {path}"
        )
    saved = RunConfig.recorded(loaded.section("run"))
    n_layer = ModelConfig(**loaded.section("model")).n_layer
    contradictions = [
        f"{flag(name)}: the checkpoint has {getattr(saved, name)}, given {getattr(config, name)}"
        for name in RunConfig.model_fields
        if name in config.given and name not in MAY_CHANGE and not _agree(name, config, saved, n_layer)
    ]
    if contradictions:
        raise ConfigError(
            f"{path}: contradicts the flags given; leave them out, or start a new run:\n  "
            + "\n  ".join(contradictions)
        )
    changes = {name: getattr(config, name) for name in config.given & MAY_CHANGE} | {"out_dir": run_folder(config)}
    changes["callback"] = config.callback  # code of the user's own runs where the user names it, not a checkpoint
    further = changes.get("steps")
    if config.resume == "auto" and further == saved.steps:
        further = None  # the command line of the run itself, once more
    lengths = [name for name in ("epochs", "time_budget") if name in config.given]
    again = config.resume == "auto" and all(getattr(config, name) == getattr(saved, name) for name in lengths)
    return Resumed(found, saved.replace(**changes), further, bool(lengths) and not again)


def _agree(name: str, given: RunConfig, saved: RunConfig, n_layer: int) -> bool:
    """Whether a field is the same; two patterns of layers are, if they give each layer the same kind."""
    mine, theirs = getattr(given, name), getattr(saved, name)
    if name == "layers" and mine and theirs:
        return stack_kinds(mine, n_layer) == stack_kinds(theirs, n_layer)
    return bool(mine == theirs)
