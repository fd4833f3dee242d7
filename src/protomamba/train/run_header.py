"""What a run says of itself at its start and end."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from protomamba.config import RunConfig, flag
from protomamba.train.trainer import Trainer


def header(
    environment: Mapping[str, Any], trainer: Trainer, config: RunConfig, data: str, resumed_from: str | None
) -> dict[str, str]:
    """The lines at the start, by name: with what, of what shape, on what data, from where to where."""
    model = trainer.model
    parameters, moving = model.parameter_count(), model.parameter_count(trainable_only=True)
    layers = f"{len(model.layers)} x {config.layer}, d_model {config.d_model}, d_state {config.d_state}"
    return {
        "protomamba": f"{environment['protomamba']} ({environment['commit'] or 'no commit'}), "
        f"torch {environment['torch']}, python {environment['python']}",
        "kernels": f"{environment['kernels']} ({environment['cpu_level']}), {config.precision} products by "
        f"{environment['matmul']}, {environment['threads']} threads",
        "model": f"{layers}, {config.head} head over {model.config.classes:,} classes; "
        f"{parameters:,} parameters, {moving:,} trainable",
        "data": data,
        "run": f"steps {trainer.step:,} to {trainer.target_step:,}, seed {config.seed}, "
        f"in {config.out_dir}" + (f", resumed from {resumed_from}" if resumed_from else ""),
    }


def goodbye(reason: str, step: int, folder: Path) -> str:
    """The last line: how the run ended and what there is to do."""
    if reason == "signal":
        return f"stopped by a signal: step {step:,}; go on: protomamba train --resume auto --out-dir {folder}"
    return f"{reason.replace('_', ' ')}: step {step:,}; checkpoints and metrics are in {folder}"


# Fields that only one layer or head reads, and which.
_READ_BY = {"prototypes": ("head", "hpn"), "separation": ("head", "hpn"), "tie_embedding": ("head", "softmax")}
_READ_BY |= {"expand": ("layer", "mamba"), "dt_rank": ("layer", "mamba")}


def idle_flags(config: RunConfig) -> list[str]:
    """Notes on flags that were given and change nothing. A user's own layer or head may read all."""
    notes = []
    for name, (what, reader) in _READ_BY.items():
        chosen = getattr(config, what)
        if ":" not in chosen and chosen != reader and name in config.given:
            notes.append(f"{flag(name)} changes nothing: the {what} is {chosen}, {reader} reads it")
    return notes


def default_notes(config: RunConfig) -> list[str]:
    """What a run that keeps two surprising documented defaults should know, and how to turn them off."""
    notes = []
    if config.bp_cadence_steps > 1:
        notes.append(
            f"backpropagation on one step in {config.bp_cadence_steps} only, local updates of D on the others: "
            "--bp-cadence-steps 1 backpropagates on each"
        )
    if config.final_layers > config.base_layers:
        notes.append(
            f"grown from {config.base_layers} to {config.final_layers} layers ({config.placement}): "
            "--target-layers equal to --base-layers does not grow"
        )
    if config.freeze != "none":
        notes.append(f"frozen layers {config.freeze}: they never change; --freeze none trains all")
    return notes
