"""What a run says of itself at its start and end: what it ran on, of what shape, what its flags mean."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from protomamba import __version__, kernels
from protomamba.config import ModelConfig, compact_pattern
from protomamba.model.registry import chosen_parts, idle_settings
from protomamba.run_config import RunConfig
from protomamba.schema import flag
from protomamba.train.trainer import Trainer
from protomamba.words import counted


def header(trainer: Trainer, data: str, folder: str, resumed_from: str | None, further: int | None) -> dict[str, str]:
    """The lines at the start, by name: with what, of what shape, on what data, from where to where.

    further: steps to train after a resume, instead of those left to the trainer's target.
    """
    target = trainer.target_step if further is None else trainer.global_step + further
    environment, model, config = describe_environment(), trainer.model, trainer.config
    shape = model.config
    commit = f" ({environment['commit']})" if environment["commit"] else ""  # of a checkout
    parameters, moving = model.parameter_count(), model.parameter_count(trainable_only=True)
    layers = f"{stack(shape.kinds(len(model.layers)))}, d_model {shape.d_model}, d_state {shape.d_state}"
    unfused = [f"{name}.{reason}" for name, reason in model.unfused_reasons().items()]
    return {
        "protomamba": f"{environment['protomamba']}{commit}, "
        f"torch {environment['torch']}, python {environment['python']}",
        "kernels": f"{environment['kernels']} ({environment['cpu_level']}), {config.precision} products by "
        f"{environment['matmul']}, {counted(environment['threads'], 'thread')}",
        "model": f"{layers}, {shape.head} head over {shape.classes:,} classes; "
        f"{parameters:,} parameters, {moving:,} trainable",
        **({"unfused": f"module by module, which is slower: {'; '.join(unfused)}"} if unfused else {}),
        "data": data,
        "run": f"steps {trainer.global_step:,} to {target:,}, seed {config.seed}, "
        f"in {folder}" + (f", resumed from {resumed_from}" if resumed_from else ""),
    }


def stack(kinds: Sequence[str]) -> str:
    """What a stack is made of: `4 layers (mamba*3, attention)`, `6 layers (mamba)`, `8 layers (mamba*3, attention,
    repeated)`."""
    lengths = range(1, len(kinds) + 1)
    unit = next((kinds[:n] for n in lengths if all(kind == kinds[i % n] for i, kind in enumerate(kinds))), ())
    pattern = compact_pattern(",".join(unit)).replace(",", ", ") if unit else "none"
    return f"{counted(len(kinds), 'layer')} ({pattern}{', repeated' if 1 < len(unit) < len(kinds) else ''})"


def goodbye(reason: str, step: int, folder: Path | None, report: bool = False) -> str:
    """The last line: how the run ended and what there is to do."""
    if reason == "signal":
        kept = f"; to continue: protomamba train --resume auto --out-dir {folder}" if folder else ""
        return f"stopped by a signal: step {step:,}{kept}"
    kept = "checkpoints, metrics and report.html" if report else "checkpoints and metrics"
    return f"{reason.replace('_', ' ')}: step {step:,}" + (f"; {kept} are in {folder}" if folder else "")


def idle_flags(config: RunConfig, model: ModelConfig) -> list[str]:
    """Notes on flags that were given and change nothing."""
    chosen = ", ".join(name for names in chosen_parts(model).values() for name in names)
    return [
        f"{flag(name)} has no effect: it applies to {' and '.join(readers) or 'no part'}, and the model has {chosen}"
        for name, readers in idle_settings(model).items()
        if name in config.given
    ]


def default_notes(config: RunConfig) -> list[str]:
    """What a run that keeps two surprising documented defaults should know, and how to turn them off."""
    notes = []
    if config.bp_cadence_steps > 1:
        notes.append(
            f"backpropagation on only one step in {config.bp_cadence_steps}, local updates of D on the others: "
            "--bp-cadence-steps 1 backpropagates on every step"
        )
    if config.final_layers > config.base_layers:
        notes.append(
            f"grown from {config.base_layers} to {config.final_layers} layers ({config.placement}): "
            "for no growth set --target-layers to --base-layers"
        )
    if config.freeze != "none":
        notes.append(f"frozen layers {config.freeze}: they do not change; --freeze none trains all layers")
    return notes


def describe_environment() -> dict[str, Any]:
    """Versions, commit where the sources are a checkout; kernel path, CPU level, matrix products, threads."""
    path = kernels.describe()
    return {
        "protomamba": __version__,
        "commit": _commit(),
        "python": platform.python_version(),
        **path,
        "threads": int(path["threads"]),
    }


def _commit() -> str | None:
    """The commit of the checkout this package is imported from, read from .git without running git."""
    git = Path(__file__).resolve().parents[3] / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        if not head.startswith("ref: "):
            return head[:12]
        name = head.removeprefix("ref: ")
        if (git / name).is_file():
            return (git / name).read_text().strip()[:12]
        packed = (git / "packed-refs").read_text().splitlines()
        return next((line.split()[0][:12] for line in packed if line.endswith(" " + name)), None)
    except OSError:
        return None
