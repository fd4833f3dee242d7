"""From a configuration to the parts of a run, once: model and trainer, stream, validation, callbacks."""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from protomamba import kernels
from protomamba.checkpoint.folder import RunDir, make_folder
from protomamba.checkpoint.lock import RunLock
from protomamba.config import pattern_kinds
from protomamba.data.source import DataInfo, Source
from protomamba.data.stream import BatchStream
from protomamba.data.windows import Batch
from protomamba.errors import ConfigError, UserError
from protomamba.model.heads import Head
from protomamba.model.registry import load_named, resolve
from protomamba.run_config import DATA_PRESETS, DataFields, RunConfig
from protomamba.schema import flag
from protomamba.train import presets
from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.collapse import CollapseWatch
from protomamba.train.callbacks.console import Console
from protomamba.train.callbacks.last_judgement import LastJudgement
from protomamba.train.callbacks.memory import MemoryWatch
from protomamba.train.callbacks.progress import Progress
from protomamba.train.callbacks.report import ReportWriter
from protomamba.train.callbacks.trackers import TrackerCallback, require_tracker
from protomamba.train.comm import Comm, Local, join, restarted
from protomamba.train.comm_start import check_ranks, find_together, ranks_line, refuse_unshareable
from protomamba.train.comm_workers import outer_workers
from protomamba.train.frequencies import set_class_frequencies
from protomamba.train.fresh import fresh_trainer
from protomamba.train.initial_weights import (
    SHAPE,
    adapt_to_weights,
    grown_vocabulary,
    read_initial_weights,
)
from protomamba.train.inputs import Held, Inputs, open_inputs, stream_spec
from protomamba.train.length import settle_length
from protomamba.train.outer import trainer_class
from protomamba.train.resume import Resumed, run_folder
from protomamba.train.run import Run
from protomamba.train.run_header import default_notes, header, idle_flags
from protomamba.train.signals import STOPPED_EXIT_CODE, StopRequest
from protomamba.train.trainer import Trainer

# The flags whose value may name code of the user's own.
CODE_FLAGS = ("layer", "layers", "head", "input", "optimizer")


def train(config: RunConfig, console: Console | None = None, began: float | None = None) -> int:
    """Run `protomamba train`. Returns the exit code: 0 done, 75 stopped by a signal after saving a checkpoint.

    began: from when --time-budget counts, on the clock of time.perf_counter; None: from now.
    Raises UserError (exit 1) and ConfigError (exit 2).
    """
    began = time.perf_counter() if began is None else began
    lengths = [flag(name) for name in ("steps", "epochs", "time_budget") if name in config.given]
    if len(lengths) > 1:
        raise ConfigError(f"{' and '.join(lengths)} exclude each other: give one of them")
    folder = run_folder(config)
    # What is started again may go on from a newer one, and that one may be pruned by then.
    if config.resume not in (None, "auto") and not restarted() and not Path(config.resume).exists():
        raise UserError(f"--resume {config.resume}: there is no such checkpoint")
    for name in config.track:
        require_tracker(name)
    load_named_code(config)
    with StopRequest() as stop, join() as comm, lead(comm, folder):
        resumed = find_together(config, comm)
        config = resumed.config if resumed else config
        with console or Console(progress=config.progress) as shown:
            run = build_run(config, resumed, stop, shown, comm=comm, began=began)
            reason = run.fit()
    return STOPPED_EXIT_CODE if reason == "signal" else 0


@contextmanager
def lead(comm: Comm, folder: Path) -> Iterator[None]:
    """Rank 0 makes the run folder and holds its lock; the others leave it alone."""
    if comm.rank > 0:
        yield
        return
    make_folder(folder)
    with RunLock(folder):
        yield


def load_named_code(config: RunConfig) -> None:
    """Import the code that the user named; what only a checkpoint names stays unloaded."""
    if {"layer", "layers"} <= config.given:
        raise ConfigError(f"--layer {config.layer} and --layers {config.layers}: give one of them")
    for what in sorted(set(CODE_FLAGS) & config.given):
        for name in pattern_kinds(getattr(config, what) or ""):
            load_named(name, what)
    for name in config.callback:
        load_named(name, "callback")


def use_machine(threads: int | None, kernel_mode: str) -> None:
    """Torch's threads and the kernels, as asked, and sums in a fixed order; for the whole process."""
    # Of what a run uses, only the gradient of plain indexing is affected, in a user's layer or head: with several
    # threads torch would add it up in any order. Memory is not filled: that only finds bugs, and costs a pass.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if threads:
        torch.set_num_threads(threads)
    kernels.set_kernels(kernel_mode)


@dataclass
class Parts:
    """What a configuration resolves to; `config` is it resolved, for the record only."""

    config: RunConfig
    trainer: Trainer
    inputs: Inputs
    stream: BatchStream
    validation: Held | None
    notes: list[str]
    further_steps: int | None = None


def build_run(
    config: RunConfig,
    resumed: Resumed | None,
    stop: StopRequest,
    console: Console,
    callbacks: Sequence[Callback] = (),
    comm: Comm | None = None,
    began: float | None = None,
) -> Run:
    """The run that a configuration describes, or the checkpoint it resumes. The caller holds the folder's lock."""
    use_machine(config.threads, config.kernels)
    if comm is not None:
        comm.share_cores(torch.get_num_threads())
    torch.manual_seed(config.seed)
    parts = build_parts(config, resumed, comm, began)
    config, trainer = parts.config, parts.trainer
    resumed_from = str(resumed.found.path) if resumed else None
    lines = header(trainer, parts.stream.describe(), str(config.out_dir), resumed_from, parts.further_steps)
    shown = Progress(console, {**lines, **ranks_line(trainer, config.batch_size)}, parts.notes)
    return Run(
        trainer,
        parts.stream,
        parts.validation,
        (shown, CollapseWatch(), MemoryWatch(), *last_judgement(parts), *chosen_callbacks(config), *callbacks),
        RunDir(config.out_dir, config.keep_last),
        log_every=config.log_every,
        val_every=config.val_every,
        save_every=config.save_every,
        grad_accum=config.grad_accum,
        patience=config.early_stopping_patience,
        on_save_error=config.on_save_error,
        prefetch=(config.prefetch_workers, config.prefetch_buffer),
        resume=resumed.found if resumed else None,
        further_steps=parts.further_steps,
        record={
            "run": config.to_json(),
            "tokenizer": parts.inputs.tokenizer,
            "data": parts.inputs.record,
            **({"launch": trainer.comm.launch} if trainer.comm.launch else {}),
        },
        tensors=parts.inputs.tensors,
        stop=stop,
    )


def last_judgement(parts: Parts) -> list[Callback]:
    """Judges the best model at the end, where anything is held out."""
    return [LastJudgement(parts.inputs, parts.validation)] if parts.validation is not None else []


def chosen_callbacks(config: RunConfig) -> list[Callback]:
    """Those of the flags: the user's own, trackers, and last the report, which shows what the others had to say."""
    chosen = [*map(make_callback, config.callback), *map(TrackerCallback, config.track)]
    return [*chosen, *([ReportWriter()] if config.write_report else [])]


def make_callback(name: str) -> Callback:
    """The user's own callback `package.module:Class`, made without arguments. ConfigError where that is not one."""
    kind: Any = resolve(name, {}, Callback, "callback")
    try:
        made: Callback = kind()
    except TypeError as error:
        raise ConfigError(f"--callback {name}: cannot be constructed without arguments: {error}") from None
    return made


def build_parts(
    config: RunConfig, resumed: Resumed | None = None, comm: Comm | None = None, began: float | None = None
) -> Parts:
    """Open the data, build the model as the flags, given weights or the checkpoint say. UserError, ConfigError."""
    began, comm = time.perf_counter() if began is None else began, comm or Local()
    refuse_unshareable(config, comm)
    weights = read_initial_weights(config.init_from) if config.init_from and not resumed else None
    config = adapt_to_weights(config, weights) if weights else config
    with comm.in_turn():
        inputs = open_inputs(config.project(DataFields), seed=config.seed, corpus=config.out_dir / "corpus")
    if weights:
        size = grown_vocabulary(weights, inputs.vocabulary, inputs.vocab_size)
        inputs = replace(inputs, vocab_size=size)
    config, preset_notes = adopt_data_preset(
        config.replace(**inputs.decided), inputs.training.info, not resumed, SHAPE if weights else ()
    )
    config = fit_input(config, inputs.training.info)
    inputs.check(config.seq_len)
    spec = stream_spec(config.project(DataFields), config.seed)
    stream = inputs.training.stream(spec)
    if resumed:
        trainer, notes = trainer_class(config).from_checkpoint(resumed.found.checkpoint, comm), list[str]()
    else:
        trainer, notes = fresh_trainer(config, inputs.vocab_size, weights, comm)
        set_class_frequencies(trainer.model.head, inputs.training, spec)
        weigh_classes(trainer.model.head, inputs.training, config.class_weights)
    notes += trainer.model.head.notes
    validation = None if inputs.validation is None else Held(inputs.validation, spec, config.eval_batches)
    _require_validation(validation, config)
    measured = (trainer, stream, validation, None if validation is None else LastJudgement(inputs, validation))
    config, further, length_notes = settle_length(config, resumed, measured, began)
    config = config.replace(
        grad_shards=trainer.grad_shards, workers_outer=outer_workers(trainer.config, trainer.grad_shards)
    )
    notes += check_ranks(comm, config, inputs.training, resumed)
    told = [*default_notes(config), *idle_flags(config, trainer.model.config)]
    notes = [*notes, *preset_notes, *length_notes, *inputs.notes, *told]
    return Parts(config, trainer, inputs, stream, validation, notes, further)


def fit_input(config: RunConfig, info: DataInfo) -> RunConfig:
    """The input part that the data needs; ConfigError where another is given."""
    if info.input != "vector":
        if config.input == "vector":
            raise ConfigError("--input vector: the data holds tokens, not vectors of values")
        return config
    if "input" in config.given and config.input == "tokens":
        raise ConfigError(f"--input tokens: the data holds vectors of {info.channels} values; leave it out")
    kind = "vector" if config.input == "tokens" else config.input
    return config.replace(input=kind, input_options={"channels": info.channels, **config.input_options})


def weigh_classes(head: Head, training: Source, how: str) -> None:
    """Let each class count alike, whatever its share of the targets, where that is asked for."""
    if how == "none":
        return
    counts = training.class_counts()
    if counts is None or training.info.n_class is None:
        raise ConfigError("--class-weights balanced: the data has no labels to weight")
    padded = torch.zeros(head.classes, dtype=torch.float64)
    padded[: len(counts)] = torch.from_numpy(counts).double()
    # A class that is never a target has no weight to give.
    head.set_class_weights((padded.sum() / (head.classes * padded.clamp_min(1))).float())


def adopt_data_preset(
    config: RunConfig, info: DataInfo, fresh: bool, decided: Collection[str] = ()
) -> tuple[RunConfig, list[str]]:
    """Sizes and schedule from the data, where a preset says so and nothing else is given or decided; what they are."""
    named = "preset" in config.given or not config.data
    preset = config.preset if named else (info.preset or "plain")
    if preset not in DATA_PRESETS or not fresh:
        return config, []
    derived = presets.derive(preset, info)
    taken = {name: value for name, value in derived.items() if name not in config.given and name not in decided}
    return config.replace(preset=preset, **taken), [presets.described(preset, derived, set(taken))]


def _require_validation(validation: Iterable[Batch] | None, config: RunConfig) -> None:
    """UserError, before any training, if what is held out is too short for a window."""
    try:
        if validation is not None:
            next(iter(validation))
    except UserError as error:
        if config.val_token_file or config.val_token_dir:
            raise
        ratio = f"--val-ratio {config.val_ratio:g}"
        raise UserError(
            f"held out by {ratio}: {error}; or use another --val-ratio (0 holds nothing out) or --val-token-file"
        ) from None
