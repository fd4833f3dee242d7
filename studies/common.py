"""What the studies of training share: a run in this process, what its steps cost, and a table kept inside a page.

Time is processor time of one thread: what the wall clock shows on a core that nothing else uses. The cost of a step is
measured with the candidates taking turns, so that a busy machine slows all of them alike, and the median of the turns
is taken; a run's clock is its steps times that.
"""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protomamba.data.corpus import SHARD, default_corpus
from protomamba.run_config import DataFields, RunConfig
from protomamba.train.build import fresh_trainer
from protomamba.train.frequencies import set_class_frequencies
from protomamba.train.inputs import Held, open_inputs, stream_spec
from protomamba.train.passes import MicroBatch
from protomamba.train.trainer import StepStats, Trainer

# Two Mamba layers of width 64 on 8 x 128 bytes a step: what two minutes of one core can bring to its limits.
SHAPE = {"d_model": 64, "base_layers": 2, "target_layers": 2, "freeze": "none", "batch_size": 8, "seq_len": 128}
UPDATES = {"lr": 4e-3, "lr_warmup_steps": 100, "lr_min_scale": 0.02, "grad_clip_norm": 1.0}
PLAIN = {"bp_cadence_steps": 1, "ff_lr": 0.0}
EVAL_BATCHES = 64


def corpus_config(folder: Path, **fields: Any) -> RunConfig:
    """A run on the standard library's bytes, which are built into `folder` once."""
    default_corpus(folder / "corpus")
    values = {**SHAPE, **UPDATES, **PLAIN, "packed_sequences": False, "token_file": folder / "corpus" / SHARD}
    return RunConfig(**{**values, **fields})


@dataclass
class Session:
    """A trainer on its stream, with fixed held-out windows."""

    trainer: Trainer
    batches: Callable[[int], MicroBatch]
    held_out: list[MicroBatch]
    curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def start(cls, config: RunConfig, trainer: Trainer | None = None) -> Session:
        """From a configuration; `trainer` goes on where one is given."""
        data = config.project(DataFields)
        inputs = open_inputs(data, seed=config.seed, corpus=config.out_dir / "corpus")
        stream = inputs.training.stream(stream_spec(data, config.seed))
        assert inputs.validation is not None
        windows = Held(inputs.validation, stream_spec(data, config.seed), EVAL_BATCHES)
        held_out = [(b.tokens_BL, b.targets_BL, b.reset_BL) for b in windows]

        def batches(index: int) -> MicroBatch:
            batch = stream.batch(index)
            return batch.tokens_BL, batch.targets_BL, batch.reset_BL

        trainer = trainer or fresh_trainer(config, inputs.vocab_size, None)[0]
        set_class_frequencies(trainer.model.head, inputs.training, stream_spec(data, config.seed))
        return cls(trainer, batches, held_out)

    def train(self, steps: int) -> list[StepStats]:
        return [self.trainer.train_step(*self.batches(self.trainer.global_step)) for _ in range(steps)]

    def run(self, steps: int, ms: float, points: int, multiple: int = 1) -> None:
        """Lay the schedule over `steps` more and take them; held-out figures at the start and `points` times after."""
        start = self.trainer.global_step
        self.trainer.schedule_start, self.trainer.schedule_steps = start, steps
        self._note(0.0, [])
        for point in range(points):
            goal = start + round(steps * (point + 1) / points / multiple) * multiple
            taken = self.train(goal - self.trainer.global_step)
            self._note((goal - start) * ms / 1e3, taken)

    def _note(self, seconds: float, taken: list[StepStats]) -> None:
        """Held-out figures now, and the share of the steps before whose local loss was not yet 0."""
        found = self.trainer.evaluate(self.held_out)
        active = sum(bool(stats.ff_loss) for stats in taken) / max(1, len(taken))
        figures = {"loss": found.loss, "accuracy": found.accuracy, "local_active": active}
        self.curve.append({"step": self.trainer.global_step, "seconds": seconds, **figures})


def costs(sessions: Mapping[str, Session], steps: int, turns: int) -> dict[str, float]:
    """Milliseconds of processor time a train step takes, by name: the median of `turns` turns of `steps` each."""
    taken: dict[str, list[float]] = {name: [] for name in sessions}
    for turn, (name, session) in itertools.product(range(turns + 1), sessions.items()):
        started = time.process_time()
        session.train(steps)
        if turn:  # the first turn warms up
            taken[name].append(1e3 * (time.process_time() - started) / steps)
    return {name: statistics.median(values) for name, values in taken.items()}


def write_between_marks(page: Path, mark: str, text: str) -> None:
    """Put a table between `<!-- mark -->` and `<!-- end: mark -->`, leaving the rest of the page as it is."""
    begin, end = f"<!-- {mark} -->", f"<!-- end: {mark} -->"
    old = page.read_text(encoding="utf-8") if page.is_file() else f"{begin}\n{end}\n"
    if begin not in old or end not in old:
        raise SystemExit(f"{page}: expected the lines {begin!r} and {end!r} around the table")
    page.write_text(f"{old.split(begin)[0]}{begin}\n\n{text}\n\n{end}{old.split(end, 1)[1]}", encoding="utf-8")


def new_figure(name: str, panels: int) -> tuple[Any, Any]:
    """A figure that is saved as the same bytes for the same data."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = name
    from matplotlib import pyplot

    return pyplot.subplots(1, panels, figsize=(5.2 * panels, 3.8), squeeze=False)
