"""A run: the loop over a stream, with validation, checkpoints, and callbacks that watch it."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from protomamba import __version__
from protomamba.checkpoint.file import estimate_bytes
from protomamba.checkpoint.folder import Resumable, RunDir, make_folder
from protomamba.checkpoint.lock import RunLock
from protomamba.data.prefetch import BatchSource, Prefetcher
from protomamba.errors import UserError
from protomamba.folder_lock import left_behind
from protomamba.storage import SaveError
from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.best import Best
from protomamba.train.callbacks.dispatch import Callbacks
from protomamba.train.callbacks.recorder import MetricsRecorder
from protomamba.train.callbacks.save_advice import SaveAdvice
from protomamba.train.comm import Comm, Local
from protomamba.train.passes import AnyBatch
from protomamba.train.run_header import describe_environment
from protomamba.train.run_start import Start
from protomamba.train.signals import StopRequest
from protomamba.train.trainer import StepStats, Trainer


class Run:
    """Trains to the trainer's target step over a stream, and leaves a run folder that can be resumed to the bit.

    `Run(trainer, stream, validation, folder="runs/mine", resume="auto").fit()`

    - `stream`: a `BatchSource`: batches that are a function of their index, such as `TokenStream` or `DatasetStream`.
    - `validation`: batches as `Trainer.evaluate` takes them, the same ones each time (a list, or anything that can be
      iterated again); None validates nothing.
    - `folder`: where checkpoints and metrics.jsonl go; None keeps nothing. An open `RunDir`, whose lock the caller
      holds, is taken as it is.
    - `comm`: the ranks that train together; None and the trainer's own are the same, another is refused.
    - `resume`: None starts fresh and refuses a folder that holds a run, "auto" resumes it, a path or
      `Resumable` resumes from that checkpoint.
    - `further_steps`: train that many more after a resume, on a schedule of their own; None trains to the recorded
      target.
    - `prefetch`: threads that read ahead, and batches they keep ready.
    - `record`, `tensors`: plain values, and parts of tensors by name, that each checkpoint is to carry along.
    - `patience`: validations without a better one before the run stops; 0 never stops it.
    """

    def __init__(
        self,
        trainer: Trainer,
        stream: BatchSource,
        validation: Iterable[AnyBatch] | None = None,
        callbacks: Sequence[Callback] = (),
        folder: str | Path | RunDir | None = None,
        comm: Comm | None = None,
        *,
        log_every: int = 20,
        val_every: int = 200,
        save_every: int = 200,
        grad_accum: int = 1,
        patience: int = 0,
        keep_last: int = 1,
        on_save_error: Literal["stop", "continue"] = "stop",
        prefetch: tuple[int, int] = (0, 16),
        resume: str | Path | Resumable | None = None,
        further_steps: int | None = None,
        record: Mapping[str, Any] | None = None,
        tensors: Mapping[str, Any] | None = None,
        stop: StopRequest | None = None,
    ) -> None:
        if validation is not None and iter(validation) is validation:
            raise TypeError(
                "validation: each validation iterates over it again, but it can be iterated only once; give a list"
            )
        if comm is not None and comm is not trainer.comm and not type(comm) is type(trainer.comm) is Local:
            raise ValueError("comm: the trainer was made for other ranks; give it these: Trainer(model, config, comm)")
        self.trainer, self.stream, self.validation = trainer, stream, validation
        self.comm, self._leads, self._keeps = trainer.comm, trainer.comm.rank == 0, folder is not None
        self.log_every, self.val_every, self.save_every = log_every, val_every, save_every
        self.grad_accum, self.prefetch = grad_accum, prefetch
        self.keep_last, self.on_save_error = keep_last, on_save_error
        self.best = Best(patience)
        self.folder: RunDir | None = folder if isinstance(folder, RunDir) and self._leads else None
        self._folder_path = None if folder is None or isinstance(folder, RunDir) else Path(folder)
        self.callbacks = Callbacks([self.best], callbacks if self._leads else ())
        self._start = Start(resume, further_steps)
        self.record, self.tensors = dict(record or {}), dict(tensors or {})
        self.resumed_from: Path | None = None
        self.error: BaseException | None = None
        self.is_logged = self.saved_best = False
        self.speed: dict[str, float] = {}
        self._own_stop, self._stop = stop is None, stop or StopRequest()
        self._reason: str | None = None
        self._clock, self._clock_step = time.perf_counter(), 0

    # What a callback may ask for.

    def stop(self, reason: str = "stopped") -> None:
        """End after the current step, with a checkpoint; `reason` is shown and recorded."""
        self._reason = self._reason or reason

    def note(self, text: str) -> None:
        """Send a message to the callbacks: the console shows it, the metrics record it."""
        self.callbacks.call_event(self, "on_message", text, False)

    def warn(self, text: str) -> None:
        """Send a warning to the callbacks."""
        self.callbacks.call_event(self, "on_message", text, True)

    def log(self, event: str, **fields: Any) -> None:
        """A line for metrics.jsonl, at this step."""
        self.callbacks.call_event(self, "on_event", event, fields)

    def output_lost(self, error: OSError) -> None:
        """Tell the callbacks that standard output can no longer be written to."""
        self.callbacks.call_event(self, "on_output_lost", error)

    def facts(self) -> dict[str, Any]:
        """What the run is, for its record: environment, parameters, seed, where it came from and where it goes."""
        model = self.trainer.model
        return {
            **describe_environment(),
            "parameters": model.parameter_count(),
            "trainable_parameters": model.parameter_count(trainable_only=True),
            "precision": self.trainer.config.precision,
            "seed": self.trainer.config.seed,
            "resumed_from": str(self.resumed_from) if self.resumed_from else None,
            "target_step": self.trainer.target_step,
            "ranks": self.comm.world,
            "grad_shards": self.trainer.grad_shards,
        }

    def step_fields(self, stats: StepStats) -> dict[str, Any]:
        """The figures of a step as metrics.jsonl has them."""
        epoch = self.stream.cursor(self.stream.position).get("epoch", 0)
        return {**asdict(stats), **self.speed, "epoch": int(epoch)}

    # The run.

    def fit(self) -> str:
        """Train to the target step, or until something ends it. Returns the reason: done, early_stopping, signal, or
        what a callback gave to `stop`.

        Raises UserError for what the user can fix; whatever is raised, metrics.jsonl says that the run failed.
        """
        with contextlib.ExitStack() as held:
            if self._own_stop:
                held.enter_context(self._stop)
            if self._folder_path is not None and self._leads:
                make_folder(self._folder_path)
                held.enter_context(RunLock(self._folder_path))
                self.folder = RunDir(self._folder_path, self.keep_last)
            return self._fit()

    def _fit(self) -> str:
        if self.folder is not None:
            self.callbacks.insert(1, MetricsRecorder(self.folder.metrics))
        notes = self._start.begin(self)
        self._check_space()
        reason = "failed"
        try:
            self.callbacks.call_event(self, "on_start")
            for note in notes:
                self.note(note)
            if self.folder is not None and (who := left_behind(self.folder.folder)):
                self.warn(
                    f"the last run here ({who}) ended without a final record: it was killed (out of memory?), or its "
                    "machine went down"
                )
            with Prefetcher(self.stream, *self.prefetch) as self._batches:
                self._reset_clock()
                reason = self._loop()
            self.callbacks.call_event(self, "on_finish", reason)
        except BaseException as error:
            self.error = error
            raise
        finally:
            self.callbacks.call_event(self, "on_end", reason)
        return reason

    def _loop(self) -> str:
        trainer = self.trainer
        if trainer.global_step >= trainer.target_step:
            self.note(f"already complete; to continue: {self._continue_command()}")
        elif self.best.out_of_patience:
            self.note(f"already stopped early; to continue: {self._continue_command()}")
            return "early_stopping"
        while trainer.global_step < trainer.target_step:
            stats = trainer.train_step(*(next(self._batches) for _ in range(self.grad_accum)))
            self._report(stats)
            best = self._validate() if self._due(self.val_every) else False
            if self._stop.requested:
                self.stop("signal")
            if self.best.out_of_patience and self._leads:
                self.stop("early_stopping")
            best = self._agree(best)
            if self._reason or best or self._due(self.save_every):
                self._save(best)
            if self._reason:
                return self._reason
        return "done"

    def _agree(self, best: bool) -> bool:
        """All ranks end after the same step, whichever was asked to; whether this one is the best, rank 0 decides."""
        told = self.comm.all_gather_object([self._reason, best])
        self._reason = next((reason for reason, _ in told if reason), None)
        return bool(told[0][1])

    def _continue_command(self) -> str:
        if "run" not in self.record:
            return "Run(..., further_steps=N)"
        path = self.folder.latest if self.folder else "CHECKPOINT"
        return f"protomamba train --resume {path} --steps N (N further steps)"

    def _due(self, every: int) -> bool:
        return self.trainer.global_step % every == 0 or self.trainer.global_step == self.trainer.target_step

    def _report(self, stats: StepStats) -> None:
        self.is_logged = self._due(self.log_every) or stats.skipped_update
        elapsed, steps = time.perf_counter() - self._clock, stats.step - self._clock_step
        self.speed = {"tokens_per_s": stats.tokens * steps / elapsed, "step_ms": 1e3 * elapsed / steps}
        self.callbacks.call_event(self, "on_step", stats)
        if self.is_logged:
            self._reset_clock()
        if stats.skipped_update:
            self.warn(f"step {stats.step}: NaN or Inf, update skipped ({self.trainer.skipped_total} so far)")

    def _reset_clock(self) -> None:
        self._clock, self._clock_step = time.perf_counter(), self.trainer.global_step

    def _validate(self) -> bool:
        """Evaluate the validation batches; whether the result is the best so far."""
        if self.validation is None:
            return False
        result = self.trainer.evaluate(self.validation, calibrate=True, exact=False)
        if not result.targets:
            raise UserError("the validation batches contain no targets")
        result.bytes_per_token = getattr(self.validation, "bytes_per_token", None)
        result.raw_unit = getattr(self.validation, "raw_unit", "byte")
        self.callbacks.call_event(self, "on_validation", result)
        self._reset_clock()
        return result.best

    # What is kept.

    def _save(self, best: bool) -> None:
        if not self._keeps:
            return
        parts = self.parts()  # of all ranks
        if self.folder is not None:
            self._write(self.folder, parts, best)

    def _write(self, folder: RunDir, parts: dict[str, Mapping[str, Any]], best: bool) -> None:
        step, started = self.trainer.global_step, time.perf_counter()
        info = {"val_loss": self.best.best_val_loss, "val_nll": self.best.best_val_nll} if best else {}
        self.saved_best = best
        self.trainer.require_finite_tables()
        self.callbacks.call_event(self, "on_before_save")
        try:
            report = folder.save(parts, config=self.configs(), step=step, best=best, info=info)
        except SaveError as error:
            self._tolerate(error)
            self.callbacks.call_event(self, "on_save_error", error)
        else:
            self._write_mirror(folder)
            self.callbacks.call_event(self, "on_save", report)
        self._clock += time.perf_counter() - started

    def _write_mirror(self, folder: RunDir) -> None:
        try:
            folder.write_state(self._mirror())
        except SaveError as error:
            self._tolerate(error)

    def _tolerate(self, error: SaveError) -> None:
        """Warn of a save that failed, where the run continues regardless; else raise."""
        if self.on_save_error == "stop":
            raise error
        self.warn(f"{error}; training continues (--on-save-error continue)")

    def parts(self) -> dict[str, Mapping[str, Any]]:
        """Everything a checkpoint of this run holds."""
        streams = {"stream": self.stream.state_dict(), "callbacks": self.callbacks.state()}
        return {**self.tensors, **self.trainer.parts(), **streams}

    def configs(self) -> dict[str, Any]:
        """What a checkpoint says beside its parts: the version that wrote it, the configurations, and the record."""
        return {"protomamba": __version__, **self.trainer.configs(), **self.record}

    def _mirror(self) -> dict[str, Any]:
        """run_state.json: the cursor, best figures and patience, for people."""
        state = {**self.trainer.state_dict(), **self.best.state_dict()}
        return {**state, "cursor": self.stream.cursor(self.stream.position)}

    def _check_space(self) -> None:
        if not self._keeps:
            return
        parts, to_come = self.parts(), sum(self.comm.all_gather_object(self.trainer.optimizer.bytes_to_come()))
        if self.folder is not None:
            size = estimate_bytes(parts, config=self.configs()) + to_come
            self.folder.require_space(size)
            self.callbacks.append(SaveAdvice(size))
            self.folder.write_config(self.record.get("run") or self.trainer.configs())
