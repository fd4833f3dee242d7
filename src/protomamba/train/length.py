"""How long a run is, where the user gives epochs or a time instead of steps."""

from __future__ import annotations

import math
import time

from protomamba.data.stream import BatchStream
from protomamba.run_config import DATA_PRESETS, RunConfig
from protomamba.train import budget, presets
from protomamba.train.callbacks.last_judgement import LastJudgement
from protomamba.train.inputs import Held
from protomamba.train.resume import Resumed
from protomamba.train.trainer import Trainer

# What a run spends its time on: steps, validations, and the judgement at its end.
MeasuredParts = tuple[Trainer, BatchStream, Held | None, LastJudgement | None]


def settle_length(
    config: RunConfig, resumed: Resumed | None, parts: MeasuredParts, began: float
) -> tuple[RunConfig, int | None, list[str]]:
    """The steps of --epochs or --time-budget, laid as the trainer's schedule; after a resume, as further steps.

    Returns the configuration with them recorded, the further steps of a resume, and what to tell.
    """
    trainer, stream, *_ = parts
    if (config.epochs, config.time_budget) == (None, None) or (resumed and not resumed.new_length):
        return config, resumed.further_steps if resumed else None, []
    if config.epochs is not None:
        config = config.replace(steps=max(1, math.ceil(config.epochs * stream.steps_per_epoch / config.grad_accum)))
        notes = [f"{config.epochs:g} epochs are {config.steps:,} steps"]
    else:
        config, notes = _budgeted(config, parts, began)
    if resumed:
        return config, config.steps, notes
    trainer.config = trainer.config.replace(steps=config.steps)
    trainer.schedule_steps = config.steps
    return config, None, notes


def _budgeted(config: RunConfig, parts: MeasuredParts, began: float) -> tuple[RunConfig, list[str]]:
    """The configuration with the steps that fit into --time-budget from `began` on, and their prediction."""
    trainer, stream, validation, judgement = parts
    judged = judgement.seconds if judgement else None
    whole = budget.seconds_of(str(config.time_budget))
    costs = budget.measure(trainer, stream, validation, config.grad_accum, config.out_dir, whole, judged)
    left = whole - trainer.comm.all_gather_object(time.perf_counter() - began)[0]
    events = budget.events_within(left, costs, presets.EVENTS)
    # What the preset chose, and nobody gave, is spread over the steps there will be.
    spread = [n for n in ("val_every", "save_every") if config.preset in DATA_PRESETS and n not in config.given]
    val_every, save_every = (None if n in spread else getattr(config, n) for n in ("val_every", "save_every"))
    steps = budget.steps_within(left, costs, val_every, save_every, events)
    cadence = {name: max(1, math.ceil(steps / events)) for name in spread}
    told = (
        f"{config.time_budget}: {steps:,} steps of {1e3 * costs.step:.1f} ms fit, with validations of "
        f"{costs.validation:.1f} s, checkpoints of {costs.save:.2f} s, and {costs.judgement:.1f} s for the judgement "
        "at the end; measured now, on this machine, and recorded"
    )
    return config.replace(steps=steps, **cadence), [told]
