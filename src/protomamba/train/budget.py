"""How many steps fit into a wall time: measured on a copy of the trainer before the run begins.

Several ranks take the measured steps together; what rank 0's clock says of them goes for all.
"""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import torch

from protomamba.data.prefetch import BatchSource
from protomamba.errors import ConfigError
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.trainer import Trainer

WARM_UP, MEASURED = 3, 5
# Of the budget, how long steps are measured: more than MEASURED of them where they are short.
MEASURING, LONGEST_S = 0.03, 30.0
SAMPLED = 4  # batches of a validation that are timed
WHOLE = 0.03  # part of the budget that a validation may take to be measured whole
# Part of the budget kept for what is not measured, and at least so long: the report, the end of the process.
RESERVE, RESERVE_S = 0.005, 0.5
EVENTS_SHARE = 0.2  # of the time that validations and saves may take, where their number is free
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Costs:
    """Seconds of one step, one validation, one save, and of the judgement at the end."""

    step: float
    validation: float
    save: float
    judgement: float = 0.0


def seconds_of(text: str) -> float:
    """90s, 20m or 8h in seconds."""
    return float(text[:-1]) * UNITS[text[-1]]


def measure(
    trainer: Trainer,
    stream: BatchSource,
    validation: Iterable[Any] | None,
    grad_accum: int,
    folder: Path,
    seconds: float,
    judgement: Callable[[SequenceModel], float] | None = None,
) -> Costs:
    """Time a copy of the trainer on the run's own batches; neither the trainer nor the random numbers change.

    seconds: of the whole budget, of which measuring takes a small part.
    """
    with torch.random.fork_rng(devices=[]):
        twin = copy.deepcopy(trainer)
        found = Costs(
            _step_seconds(twin, stream, grad_accum, min(LONGEST_S, MEASURING * seconds)),
            _validation_seconds(twin, validation, WHOLE * seconds),
            _save_seconds(twin, folder),
            judgement(twin.model) if judgement and trainer.comm.rank == 0 else 0.0,
        )
        return Costs(*trainer.comm.all_gather_object(astuple(found))[0])


def _step_seconds(trainer: Trainer, stream: BatchSource, grad_accum: int, at_least: float) -> float:
    cadence, taken = trainer.config.bp_cadence_steps, list[float]()
    count = max(WARM_UP + MEASURED, 2 * cadence)
    while trainer.comm.all_gather_object(len(taken) < count or sum(taken) < at_least)[0]:
        first = stream.position + len(taken) * grad_accum
        started = time.perf_counter()
        trainer.train_step(*(stream.batch(first + part) for part in range(grad_accum)))
        taken.append(time.perf_counter() - started)
    # With a cadence most steps are cheap: their mean counts, not their median.
    return statistics.median(taken[WARM_UP:]) if cadence == 1 else statistics.fmean(taken[WARM_UP:])


def _save_seconds(trainer: Trainer, folder: Path) -> float:
    """Of a checkpoint in the run's folder, which rank 0 writes with what the others bring."""
    started = time.perf_counter()
    if trainer.comm.rank > 0:
        trainer.parts()
    else:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".measure-") as place:
            trainer.save_checkpoint(Path(place) / "c.safetensors")
    return time.perf_counter() - started


def _validation_seconds(trainer: Trainer, validation: Iterable[Any] | None, most: float) -> float:
    """Of the whole with the reading of its batches; judged by the first ones where it would take more than `most`."""
    if validation is None:
        return 0.0
    started = time.perf_counter()
    batches = list(validation)
    reading = time.perf_counter() - started
    few = batches[:SAMPLED]
    found = reading + _evaluation_seconds(trainer, few) * len(batches) / len(few)
    told = trainer.comm.all_gather_object(found <= most)[0]
    return reading + _evaluation_seconds(trainer, batches) if told else found


def _evaluation_seconds(trainer: Trainer, batches: Sequence[Any]) -> float:
    started = time.perf_counter()
    trainer.evaluate(batches, calibrate=True, exact=False)
    return time.perf_counter() - started


def events_within(seconds: float, costs: Costs, most: int) -> int:
    """Validations, and as many saves, that a run of that length affords: at most `most`, and a fifth of the time."""
    one = costs.validation + costs.save
    return max(1, min(most, math.floor(EVENTS_SHARE * seconds / one))) if one > 0 else most


def steps_within(seconds: float, costs: Costs, val_every: int | None, save_every: int | None, events: int) -> int:
    """The steps whose time, with validations and saves, comes nearest to `seconds` without passing it.

    val_every, save_every: steps between them; None where `events` of them are spread over the run.
    ConfigError where not even one step fits.
    """
    left, a_step = seconds - max(RESERVE_S, RESERVE * seconds) - costs.judgement, costs.step
    for every, cost in ((val_every, costs.validation), (save_every, costs.save)):
        if every is None:
            left -= events * cost
        else:
            a_step += cost / every
    steps = math.floor(left / a_step)
    if steps < 1:
        raise ConfigError(
            f"--time-budget: {max(0.0, seconds):.0f} s are left after the start, which is too short: a step takes "
            f"{costs.step:.2f} s, a validation {costs.validation:.1f} s, a checkpoint {costs.save:.1f} s, "
            f"the judgement at the end {costs.judgement:.1f} s"
        )
    return steps
