"""A whole training run: start or resume, the loop, validation, checkpoints, metrics, and how it ends."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from protomamba import kernels
from protomamba.checkpoint.file import estimate_bytes
from protomamba.checkpoint.folder import RunDir, make_folder
from protomamba.checkpoint.lock import RunLock
from protomamba.config import RunConfig
from protomamba.data.prefetch import Prefetcher
from protomamba.errors import UserError
from protomamba.output import safe
from protomamba.storage import SaveError
from protomamba.train.callbacks.console import Console
from protomamba.train.callbacks.metrics import MetricsLog
from protomamba.train.environment import describe_environment
from protomamba.train.inputs import Inputs, majority_share, open_inputs, training_stream, validation_windows
from protomamba.train.run_header import default_notes, goodbye, header, idle_flags
from protomamba.train.signals import STOPPED_EXIT_CODE, StopRequest
from protomamba.train.start import (
    Resumed,
    adapt_to_weights,
    find_resume,
    fresh_trainer,
    load_named_code,
    read_initial_weights,
    resume_trainer,
    run_folder,
)
from protomamba.train.trainer import MicroBatch, StepStats, Trainer

COLLAPSE_COSINE = 0.9


def train(config: RunConfig, console: Console | None = None) -> int:
    """Run `protomamba train`. Returns the exit code: 0 done, 75 stopped by a signal after saving a checkpoint.

    Raises UserError (exit 1) and ConfigError (exit 2).
    """
    folder = run_folder(config)
    if config.resume not in (None, "auto") and not Path(config.resume).exists():
        raise UserError(f"--resume {config.resume}: there is no such checkpoint")
    make_folder(folder)
    load_named_code(config)
    with StopRequest() as stop, RunLock(folder):
        resumed = find_resume(config)
        config = resumed.config if resumed else config
        use_machine(config)
        torch.manual_seed(config.seed)
        with console or Console(progress=config.progress) as shown:
            return Run(config, resumed, stop, shown).execute()


def use_machine(config: RunConfig) -> None:
    """Torch's threads and the kernels, as the configuration says, and sums in a fixed order; for the whole process."""
    # Of what a run uses, only the gradient of plain indexing is affected, in a user's layer or head: with several
    # threads torch would add it up in any order. Memory is not filled: that only finds bugs, and costs a pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if config.threads:
        torch.set_num_threads(config.threads)
    kernels.set_kernels(config.kernels)


@dataclass
class Progress:
    """What a run remembers from validation to validation; part of every checkpoint."""

    best_val_loss: float | None = None
    best_step: int | None = None
    stale_validations: int = 0
    first_val_loss: float | None = None

    def state_dict(self) -> dict[str, Any]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)


class Run:
    """One process's part of a run. Everything that must survive it is in `parts`."""

    def __init__(self, config: RunConfig, resumed: Resumed | None, stop: StopRequest, console: Console) -> None:
        self.stop, self.console, self.resumed = stop, console, resumed
        self.folder = RunDir(config.out_dir, config.keep_last)
        notes: list[str] = resumed.warnings if resumed else []
        if resumed is None or resumed.path.resolve().parent != self.folder.folder.resolve():
            self.folder.refuse_if_occupied()
        weights = read_initial_weights(config.init_from) if config.init_from and not resumed else None
        config = adapt_to_weights(config, weights) if weights else config
        self.inputs: Inputs = open_inputs(config)
        self.config = self.inputs.resolve(config)
        self.stream = training_stream(self.inputs, self.config)
        self.progress = Progress()
        if resumed:
            self.trainer = self._restore(resumed)
        else:
            self.trainer, built = fresh_trainer(self.config, self.inputs.vocab_size, weights)
            notes = [*notes, *built]
        self._require_validation()
        self._clock, self._clock_step = time.perf_counter(), self.trainer.step
        self._majority: float | None = None
        self._former_best: tuple[float | None, int | None] = None, None
        self.notes = [*notes, *self.inputs.notes, *default_notes(self.config), *idle_flags(self.config)]

    def _require_validation(self) -> None:
        """UserError, before any training, if what is held out is too short for a window."""
        try:
            if self.inputs.validation is not None:
                next(validation_windows(self.inputs.validation, self.config, 1))
        except UserError as error:
            if self.config.val_token_file or self.config.val_token_dir:
                raise
            ratio = f"--val-ratio {self.config.val_ratio:g}"
            raise UserError(
                f"held out by {ratio}: {error}; or another --val-ratio (0 holds nothing out), or --val-token-file"
            ) from None

    def _restore(self, resumed: Resumed) -> Trainer:
        trainer = resume_trainer(resumed)
        self.stream.load_state_dict(resumed.checkpoint.parts["stream"])
        self.progress.load_state_dict(resumed.checkpoint.parts["progress"])
        if trainer.step == trainer.schedule_start:
            self.progress.stale_validations = 0  # --steps N: further steps, with patience of their own
        newest = self.folder.adopt(resumed.path, resumed.checkpoint)
        if newest > trainer.step:
            resumed.warnings.append(
                f"steps {trainer.step + 1:,} to {newest:,} in {self.folder.folder} are abandoned: the run replaces "
                "their checkpoints, their metrics go to metrics.superseded.jsonl; another --out-dir keeps them"
            )
        if self.progress.best_step == trainer.step:
            self.folder.keep_as_best(resumed.path)  # a kill between the two names of one save left best behind
        return trainer

    def execute(self) -> int:
        """Train to the end, or to a signal; the exit code."""
        size = estimate_bytes(self.parts(), config=self.configs()) + self.trainer.optimizer.bytes_to_come()
        self.folder.require_space(size)
        self.folder.write_config(self.config.to_json())
        start = self.trainer.step if self.resumed else None
        stop = self.config.on_save_error == "stop"
        with MetricsLog(
            self.folder.metrics, resumed_step=start, warn=self.console.warn, must_acknowledge=stop
        ) as self.metrics:
            self.console.when_lost(self._tell_lost_output)
            self._announce()
            self.batches = Prefetcher(self.stream, self.config.prefetch_workers, self.config.prefetch_buffer)
            with self.batches:
                self.console.start(self.trainer.target_step, self.trainer.step)
                reason = self._fit_or_say_why_not()
                self.console.stop()
            self.metrics.log("end", step=self.trainer.step, reason=reason, skipped_updates=self.trainer.skipped_total)
            self.console.when_lost(None)
        self.console.line(goodbye(reason, self.trainer.step, self.folder.folder))
        return STOPPED_EXIT_CODE if reason == "signal" else 0

    def _tell_lost_output(self, error: OSError) -> None:
        self.metrics.log("output_lost", step=self.trainer.step, error=error.strerror)
        told = f"standard output: {error.strerror}; the run goes on, its record is {self.folder.metrics}"
        print(f"protomamba: {told}", file=safe(sys.stderr))

    def _fit_or_say_why_not(self) -> str:
        try:
            return self.fit()
        except UserError as error:
            skipped = self.trainer.skipped_total
            self.metrics.log("end", step=self.trainer.step, reason="failed", error=str(error), skipped_updates=skipped)
            raise

    def fit(self) -> str:
        """The loop. Returns why it ended: done, early_stopping or signal."""
        if self.trainer.step >= self.trainer.target_step:
            self.console.line(f"nothing to do: the run has reached its target; to train on: {self._further()}")
        elif self._out_of_patience():
            self.console.line(f"nothing to do: the run has stopped early; to train on: {self._further()}")
            return "early_stopping"
        while self.trainer.step < self.trainer.target_step:
            stats = self.trainer.update([self._next_batch() for _ in range(self.config.grad_accum)])
            self._report(stats)
            best = self._validate() if self._due(self.config.val_every) else False
            if self.stop.requested or best or self._due(self.config.save_every):
                self._save(best)
            if self.stop.requested:
                return "signal"
            if self._out_of_patience():
                self._save(best=False)
                return "early_stopping"
        return "done"

    def _further(self) -> str:
        return f"protomamba train --resume {self.folder.latest} --steps N (N further steps)"

    def _out_of_patience(self) -> bool:
        patience = self.config.early_stopping_patience
        return bool(patience) and self.progress.stale_validations >= patience

    def _next_batch(self) -> MicroBatch:
        batch = next(self.batches)
        return batch.tokens_BL, batch.targets_BL, batch.reset_BL

    def _due(self, every: int) -> bool:
        return self.trainer.step % every == 0 or self.trainer.step == self.trainer.target_step

    def _report(self, stats: StepStats) -> None:
        """Write and show a step that is due; a terminal's bar moves at each."""
        logged = self._due(self.config.log_every) or stats.skipped_update
        elapsed, steps = time.perf_counter() - self._clock, stats.step - self._clock_step
        speed = {"tokens_per_s": stats.tokens * steps / elapsed, "step_ms": 1e3 * elapsed / steps}
        fields = {**asdict(stats), **speed, "epoch": int(self.stream.cursor(self.stream.position)["epoch"])}
        if logged:
            self.metrics.log("train", **fields)
            self._clock, self._clock_step = time.perf_counter(), stats.step
        if stats.skipped_update:
            self.console.warn(f"step {stats.step}: NaN or Inf, update skipped ({self.trainer.skipped_total} so far)")
        self.console.step(stats.step, fields, logged=logged)

    def _validate(self) -> bool:
        """Loss and accuracy on the fixed windows; whether the loss is the best so far."""
        if self.inputs.validation is None:
            return False
        windows = [
            (b.tokens_BL, b.targets_BL, b.reset_BL)
            for b in validation_windows(self.inputs.validation, self.config, self.config.eval_batches)
        ]
        if self._majority is None:
            self._majority = majority_share([targets for _, targets, _ in windows])
        found = self.trainer.evaluate(windows, calibrate=True)
        progress, step = self.progress, self.trainer.step
        finite = math.isfinite(found.loss)
        best = finite and (progress.best_val_loss is None or found.loss < progress.best_val_loss)
        self._former_best = progress.best_val_loss, progress.best_step
        if best:
            progress.best_val_loss, progress.best_step, progress.stale_validations = found.loss, step, 0
        else:
            progress.stale_validations += 1
        if finite and progress.first_val_loss is None:
            progress.first_val_loss = found.loss
        self.metrics.log(
            "validation",
            step=step,
            val_loss=found.loss,
            val_accuracy=found.accuracy,
            majority_accuracy=self._majority,
            val_perplexity=found.perplexity,
            targets=found.targets,
            best=best,
        )
        self.console.line(
            f"step {step:>7,}  val_loss {found.loss:.4f}  val_accuracy {found.accuracy:.4f}"
            f"  (always guessing the commonest: {self._majority:.4f}){'  best' if best else ''}"
        )
        self._warn_of_collapse(found.loss, found.accuracy)
        self._clock, self._clock_step = time.perf_counter(), step
        return best

    def _warn_of_collapse(self, loss: float, accuracy: float) -> None:
        """The loss alone cannot show that all prototypes have drifted together; accuracy and their distances can."""
        figures = self.trainer.model.head.diagnostics()
        cosine = figures.get("nearest_cosine", 0.0)
        falling = self.progress.first_val_loss is not None and loss < 0.9 * self.progress.first_val_loss
        if cosine > COLLAPSE_COSINE:
            self.console.warn(
                f"collapse: the prototypes' mean nearest-neighbour cosine is {cosine:.3f}; "
                "use --prototypes fixed or raise --separation"
            )
        elif falling and self._majority is not None and accuracy <= self._majority:
            self.console.warn(
                f"collapse? the loss falls, but accuracy {accuracy:.4f} is not above guessing the commonest class"
            )

    def _save(self, best: bool) -> None:
        step, started = self.trainer.step, time.perf_counter()
        info = {"val_loss": self.progress.best_val_loss} if best else {}
        try:
            report = self.folder.save(self.parts(), config=self.configs(), step=step, best=best, info=info)
        except SaveError as error:
            if self.config.on_save_error == "stop":
                raise
            if best and not self.folder.holds_best(step):  # a later validation has the former one to beat
                self.progress.best_val_loss, self.progress.best_step = self._former_best
            self.console.warn(f"{error}; training goes on (--on-save-error continue)")
            self.metrics.log("checkpoint_failed", step=step, error=str(error))
        else:
            self.folder.write_state(self._mirror())
            path = str(report.path.name)
            self.metrics.log("checkpoint", step=step, path=path, bytes=report.bytes, save_ms=report.save_ms, best=best)
        self._clock += time.perf_counter() - started

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """Everything a checkpoint of this run holds."""
        return {
            **self.trainer.parts(),
            "stream": self.stream.state_dict(),
            "progress": self.progress.state_dict(),
        }

    def configs(self) -> dict[str, Any]:
        """What a checkpoint says beside its parts: the configurations, and the tokenizer so that it speaks text."""
        return {**self.trainer.configs(), "run": self.config.to_json(), "tokenizer": self.inputs.tokenizer}

    def _mirror(self) -> dict[str, Any]:
        """run_state.json: the cursor, best loss and patience, for people."""
        state = self.trainer.state_dict()
        return {**state, **self.progress.state_dict(), "cursor": self.stream.cursor(self.stream.position)}

    def _announce(self) -> None:
        """The header on the console, and the run event."""
        environment, model = describe_environment(), self.trainer.model
        resumed_from = str(self.resumed.path) if self.resumed else None
        self.metrics.log(
            "run",
            step=self.trainer.step,
            **environment,
            parameters=model.parameter_count(),
            trainable_parameters=model.parameter_count(trainable_only=True),
            precision=self.config.precision,
            seed=self.config.seed,
            resumed_from=resumed_from,
            target_step=self.trainer.target_step,
        )
        self.console.header(header(environment, self.trainer, self.config, self.stream.describe(), resumed_from))
        for note in self.notes:
            self.console.line(f"note: {note}")
