"""What a run is like where only its data is given: sizes, rate and steps from how much data there is, and of what kind.

The rules start from recipes that were measured (the demo's, docs/labelled-sequences.md) and grow the model with the
data. A configuration file and flags take precedence over them, and the run header lists them.
"""

from __future__ import annotations

import math
from typing import Any

from protomamba.data.source import DataInfo
from protomamba.errors import ConfigError
from protomamba.run_config import DATA_PRESETS

# Targets in the data up to which a model of this width and depth is taken.
SIZES = ((500_000, 64, 2), (20_000_000, 128, 2), (200_000_000, 256, 4), (math.inf, 512, 6))
BASE_RATE, BASE_WIDTH = 4e-3, 128
TOKENS_A_STEP = 2_048
FEWEST_STEPS, MOST_STEPS = 300, 20_000
WINDOW = {"bytes": 256, "text": 256, "dna": 1_024}
LONGEST_ROW = 512
EVENTS = 20  # validations, and saves, of a run


def derive(preset: str, info: DataInfo) -> dict[str, Any]:
    """The fields of a run's configuration for one of the data presets. ConfigError for a kind that does not fit."""
    if preset not in DATA_PRESETS:
        return {}
    if (preset == "classify") != (info.n_class is not None):
        kind = "labelled sequences" if info.n_class is not None else "sequences without labels"
        raise ConfigError(f"--preset {preset}: the data holds {kind}")
    targets = info.targets or 1_000_000
    d_model, layers = next((width, depth) for most, width, depth in SIZES if targets <= most)
    seq_len = _row_length(preset, info)
    batch_size = max(1, min(64, TOKENS_A_STEP // seq_len))
    epochs = _epochs(preset, targets)
    steps = round(epochs * _steps_an_epoch(preset, info, targets, batch_size, seq_len))
    sizes = {
        "d_model": d_model,
        "base_layers": layers,
        "seq_len": seq_len,
        "batch_size": batch_size,
        "steps": max(FEWEST_STEPS, min(MOST_STEPS, steps)),
        "lr": float(f"{BASE_RATE * math.sqrt(BASE_WIDTH / d_model):.1g}"),
        "lr_min_scale": 0.02,
    }
    every = math.ceil(sizes["steps"] / EVENTS)
    return {**sizes, "val_every": every, "save_every": every, "eval_batches": 32}


def _row_length(preset: str, info: DataInfo) -> int:
    if preset == "classify":
        return max(1, info.longest or 1)
    if preset in WINDOW:
        return WINDOW[preset]
    # Packed rows: what nineteen of twenty sequences stay within, a few of them side by side.
    return max(32, min(LONGEST_ROW, 1 << math.ceil(math.log2(max(2, info.usual or 64)))))


def _epochs(preset: str, targets: int) -> float:
    """Small sets are read more often."""
    if preset == "classify":
        return 30.0
    return max(1.0, min(10.0, 10_000_000 / targets))


def _steps_an_epoch(preset: str, info: DataInfo, targets: int, batch_size: int, seq_len: int) -> float:
    # A labelled sequence has one target, or one a step: rows count, of which `targets` is at least the number.
    rows = targets if preset == "classify" else targets / seq_len
    return max(1.0, rows / batch_size)


def described(preset: str, derived: dict[str, Any], taken: set[str]) -> str:
    """What the preset chose, for the user."""
    chosen = ", ".join(f"--{name.replace('_', '-')} {derived[name]:g}" for name in derived if name in taken)
    return f"preset {preset}, from the data: {chosen or 'nothing, because all were given'}"
