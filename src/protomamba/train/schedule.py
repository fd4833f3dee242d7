"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from protomamba.config import TrainFields

# The share of a schedule that warms up where no number of steps is given.
WARMUP_SHARE = 0.02
# The share at the end of `wsd` in which the rate goes down.
DECAY_SHARE = 0.2


def warmup_steps(total: int, config: TrainFields) -> int:
    """Steps of linear warm-up in a schedule over `total`."""
    given = config.lr_warmup_steps
    return min(total, math.ceil(WARMUP_SHARE * total) if given is None else given)


def learning_rate(step: int, total: int, config: TrainFields) -> float:
    """The rate of update `step` (from 0) of `total`: linear warm-up, then down to lr_min_scale * lr by the schedule.

    cosine and linear go down all the way; wsd (warm-up, stable, decay; Hu et al. 2024) stays at lr and goes down
    linearly in the last fifth; constant stays.
    """
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = min(1.0, (step - warmup) / max(1, total - warmup - 1))
    return config.lr * (config.lr_min_scale + (1 - config.lr_min_scale) * _height(config.schedule, progress))


def _height(schedule: str, progress: float) -> float:
    """Where between floor (0) and full rate (1) a schedule is, after that share of its way."""
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "wsd":
        return min(1.0, (1.0 - progress) / DECAY_SHARE)
    return 0.5 * (1 + math.cos(math.pi * progress))
