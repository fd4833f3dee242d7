"""TensorBoard, trackio and Weights & Biases: a run's curves in the tool that a user already looks at.

metrics.jsonl stays the record. What a tracker gets is what stands there, so that `protomamba track` can replay a run
that has ended, or whose tracker failed: one that raises is reported once and switched off, and the run continues.
"""

from __future__ import annotations

import importlib.util
import math
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from protomamba.errors import ConfigError, UserError
from protomamba.metrics_file import curve_values
from protomamba.report.classes import accuracy, class_figures, macro_f1
from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats
    from protomamba.train.validation import Validation

PROJECT = "protomamba"
CLASSES_SHOWN = 50


@dataclass(frozen=True)
class Tracked:
    """What a tracker is given at its start.

    identity: the same for all sessions of one run, so that a resumed run continues in the tracker too. first_step: the
    step before the first that will come; what the tracker has beyond it was abandoned.
    """

    name: str
    folder: Path
    identity: str
    config: Mapping[str, Any] = field(default_factory=dict)
    first_step: int = 0


class Tracker(Protocol):
    """One tool. Steps never fall; figures are finite; texts by name; seconds since 1970."""

    def log(self, step: int, figures: Mapping[str, float], seconds: float) -> None: ...

    def write(self, step: int, texts: Mapping[str, str], seconds: float) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in RUN/tensorboard, to be seen with `tensorboard --logdir RUN`."""

    def __init__(self, run: Tracked) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # purge_step hides what an abandoned session, or an earlier replay, wrote for the same steps.
        self._writer = SummaryWriter(str(run.folder / "tensorboard"), purge_step=run.first_step + 1)
        settings = "".join(f"    {name}: {value}\n" for name, value in run.config.items())
        self._writer.add_text("configuration", settings, run.first_step + 1)

    def log(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step, walltime=seconds)

    def write(self, step: int, texts: Mapping[str, str], seconds: float) -> None:
        for name, text in texts.items():  # shown as Markdown, which four spaces leave as it is
            self._writer.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step, walltime=seconds)

    def close(self) -> None:
        self._writer.close()


class Trackio:
    """A run in the local database of trackio (TRACKIO_DIR), to be seen with `trackio show`."""

    def __init__(self, run: Tracked) -> None:
        import trackio

        name = f"{run.name}-{run.identity}"
        self._markdown = trackio.Markdown
        self._run = trackio.init(
            PROJECT, name=name, config=dict(run.config), resume="allow", auto_log_gpu=False, auto_log_cpu=False
        )

    def log(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
        self._run.log(dict(figures), step=step)

    def write(self, step: int, texts: Mapping[str, str], seconds: float) -> None:
        self._run.log({name: self._markdown(f"```\n{text}\n```") for name, text in texts.items()}, step=step)

    def close(self) -> None:
        self._run.finish()


class WeightsAndBiases:
    """A run of wandb, in RUN/wandb; WANDB_MODE, WANDB_PROJECT and the like are wandb's own and are heeded."""

    def __init__(self, run: Tracked) -> None:
        import os

        import wandb

        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            name=run.name,
            id=run.identity,
            resume="allow",
            dir=str(run.folder),
            config=dict(run.config),
            settings=wandb.Settings(console="off"),  # it would take our output as its own
        )

    def log(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
        self._run.log(dict(figures), step=step)

    def write(self, step: int, texts: Mapping[str, str], seconds: float) -> None:
        self._run.log(dict(texts), step=step)

    def close(self) -> None:
        self._run.finish()


@dataclass(frozen=True)
class TrackerKind:
    """The package that a tracker needs, and what begins one."""

    package: str
    make: Callable[[Tracked], Tracker]


TRACKERS = {
    "tensorboard": TrackerKind("tensorboard", TensorBoard),
    "trackio": TrackerKind("trackio", Trackio),
    "wandb": TrackerKind("wandb", WeightsAndBiases),
}


def make_tracker(name: str, run: Tracked) -> Tracker:
    """The tracker of that name, begun. ConfigError for an unknown name, UserError where its package is missing."""
    require_tracker(name)
    return TRACKERS[name].make(run)


def require_tracker(name: str) -> None:
    """Raises what make_tracker raises for a name, without beginning anything: before a run does any work."""
    if name not in TRACKERS:
        raise ConfigError(f"--track {name}: expected one of {', '.join(TRACKERS)}")
    package = TRACKERS[name].package
    if importlib.util.find_spec(package) is None:
        raise UserError(f"--track {name}: the package {package} is not installed: pip install 'protomamba[{name}]'")


def new_identity() -> str:
    """Eight random hexadecimal digits; not from torch's or Python's generators, whose state belongs to the run."""
    return secrets.token_hex(4)


class TrackerCallback(Callback):
    """Sends the tracker `kind` what metrics.jsonl records of steps and validations."""

    def __init__(self, kind: str) -> None:
        require_tracker(kind)
        self.kind = kind
        self.identity = new_identity()
        self._tracker: Tracker | None = None

    @property
    def name(self) -> str:
        return f"track {self.kind}"

    def state_dict(self) -> dict[str, Any]:
        return {"identity": self.identity}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.identity = str(state["identity"])

    def on_start(self, run: Run) -> None:
        folder = run.folder.folder if run.folder else Path.cwd()
        told = Tracked(folder.resolve().name, folder, self.identity, plain_settings(run), run.trainer.global_step)

        def begin() -> None:
            self._tracker = make_tracker(self.kind, told)

        self._guarded(run, begin)

    def on_step(self, run: Run, stats: StepStats) -> None:
        if run.is_logged:
            self._log(run, {"event": "train", **run.step_fields(stats)})

    def on_validation(self, run: Run, result: Validation) -> None:
        self._log(run, {"event": "validation", "step": run.trainer.global_step, **result.fields()})

    def on_event(self, run: Run, event: str, fields: Mapping[str, Any]) -> None:
        if event in JUDGEMENTS:
            self._log(run, {"event": event, "step": run.trainer.global_step, **fields})

    def on_end(self, run: Run, reason: str) -> None:
        if self._tracker is not None:
            self._guarded(run, self._tracker.close)
            self._tracker = None

    def _log(self, run: Run, event: Mapping[str, Any]) -> None:
        if self._tracker is not None:
            tracker = self._tracker
            self._guarded(run, lambda: tell(tracker, event, time.time()))

    def _guarded(self, run: Run, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # whatever a service, its network or its disk may raise: training is worth more
            self._tracker = None
            run.warn(
                f"--track {self.kind} is switched off: {type(error).__name__}: {_first_line(error)}; afterwards, "
                f"protomamba track {run.folder.folder if run.folder else 'RUN'} --to {self.kind} replays the run"
            )


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "")


def plain_settings(run: Run) -> dict[str, Any]:
    """The run's configuration and facts as single values."""
    settings = dict(run.record.get("run") or {}) | run.facts()
    return {name: value for name, value in settings.items() if isinstance(value, bool | int | float | str)}


def tell(tracker: Tracker, event: Mapping[str, Any], seconds: float) -> None:
    """Give a tracker the figures and texts of a line of metrics.jsonl."""
    figures, texts = tracked_figures(event), tracked_texts(event)
    if figures:
        tracker.log(int(event["step"]), figures, seconds)
    if texts:
        tracker.write(int(event["step"]), texts, seconds)


def tracked_figures(event: Mapping[str, Any]) -> dict[str, float]:
    """What a tracker gets of a line: "train/loss", "validation/val_nll", "ranking/test/hit@10"."""
    kind, values = event["event"], curve_values(event)
    if kind in JUDGEMENTS:
        kind, values = f"{kind}/{event.get('split', 'validation')}", JUDGEMENTS[kind](event)
    return {f"{kind}/{name}": float(value) for name, value in values.items() if math.isfinite(value)}


def tracked_texts(event: Mapping[str, Any]) -> dict[str, str]:
    """What the model wrote: "sample", the prompt and what follows it."""
    return {"sample": f"{event.get('prompt', '')}{event['text']}"} if event["event"] == "sample" else {}


def _ranking(event: Mapping[str, Any]) -> dict[str, float]:
    baselines = event.get("baselines", {})
    return {
        **event["figures"],
        **{f"{who}/{name}": value for who, figures in baselines.items() for name, value in figures.items()},
    }


def _classification(event: Mapping[str, Any]) -> dict[str, float]:
    """Accuracy, macro F1, and where the classes are few enough to look at, each one's F1."""
    found = class_figures(event)
    each = {f"f1/{one.name}": one.f1 for one in found[:CLASSES_SHOWN]}
    return {"accuracy": accuracy(event), "macro_f1": macro_f1(found), **each}


# The lines that judge the best model, and the figures of each.
JUDGEMENTS: dict[str, Callable[[Mapping[str, Any]], dict[str, float]]] = {
    "ranking": _ranking,
    "classification": _classification,
    "sample": lambda event: {},
}


def replay(events: Iterable[Mapping[str, Any]], tracker: Tracker) -> int:
    """Give a tracker the curves, tables and texts of a run that is over, by rising steps; the number of lines given."""
    shown = [event for event in events if event["event"] in ("train", "validation", *JUDGEMENTS)]
    for event in sorted(shown, key=lambda event: event["step"]):
        tell(tracker, event, float(event.get("time", 0.0)))
    tracker.close()
    return len(shown)
