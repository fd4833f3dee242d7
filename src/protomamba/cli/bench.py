"""`protomamba bench`: which measurements, in which order, and where they go."""

from __future__ import annotations

import json
import os
import shlex
import sys
from argparse import Namespace
from pathlib import Path

import torch

from protomamba.bench import report
from protomamba.bench.ops import measure_op
from protomamba.bench.ranks import memory_table, ranks_table
from protomamba.bench.report import Section
from protomamba.bench.shapes import Shape, parse_shapes
from protomamba.bench.step import measure_step
from protomamba.bench.sweeps import lengths_table, threads_table
from protomamba.errors import ConfigError, UserError
from protomamba.kernels import available, keep_freed_memory
from protomamba.train.callbacks.console import rich_console

SECTIONS = ("steps", "threads", "lengths", "ranks")
PRECISIONS = ("fp32", "bf16")
THREADED_SHAPES = ("L", "one-row")

STEP_NOTES = (
    "A column is one shape: rows x tokens, width, layers; V = 8192, hpn head. Ratios are medians over rounds, formed "
    "within a round, with the smallest and largest. The floor is the matrix products of the blocks, forward and both "
    "backward ones, by plain torch in float32; the own floor is the same products in the step's precision on the "
    "faster of torch's two BLAS libraries, which the blocks use, and the head's three over as many classes as its "
    "sample has, at most 1,024; the own floor of the blocks is without these. Where torch's own choice is slow, a step "
    "can be below the floor. Tokens and targets have the frequencies of text (Zipf). A whole step clips (every time), "
    "updates with AdamW and checks everything for NaN. A forward-only step moves D by local updates. Parts are shares "
    "of a profile of the same step (protomamba.bench.step).",
    "reference / native: a step of one layer on rows of at most 64 tokens: the reference walks them in Python.",
)
THREAD_NOTES = (
    "Speed-ups within one run, in rotation; the last ratios say how much of the floor's own gain the step gets.",
)
RANK_NOTES = (
    "Two ranks of torch's launcher on this machine beside one process with one thread, and with two, in rotation: with "
    "as many rows each (weak scaling), and sharing the same batch. docs/scale-out.md.",
)
MEMORY_NOTES = ("The most of any rank, torch itself included, with one thread; the moments are shared out.",)
LENGTH_NOTES = ("Width 256, 4 layers, 65,536 tokens a step. Peak resident memory of a process that does nothing else.",)


def bench(arguments: Namespace) -> int:
    """Measure, print a table or JSON, write Markdown if asked. The exit code; UserError where an op is wrong."""
    _prepare(arguments)
    shapes, precisions = parse_shapes(arguments.shapes), _words("--precision", arguments.precision, PRECISIONS)
    command = "protomamba " + shlex.join(sys.argv[1:] or ["bench"])
    about = report.facts(command)
    sections = _ops(arguments, shapes) if arguments.op else _sections(arguments, shapes, precisions)
    if arguments.markdown:
        _write(arguments.markdown, report.to_markdown(sections, about))
    if arguments.json:
        print(json.dumps(report.to_json(sections, about)))
    else:
        report.show(sections, about, rich_console())
    return 0


def _prepare(arguments: Namespace) -> None:
    found, why = available()
    if not found:
        raise UserError(f"bench: there is nothing to measure: {why}")
    for name in ("rounds", "threads"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: expected an integer >= 1")
    if arguments.clock == "cpu" and arguments.threads != 1:
        raise ConfigError("--clock cpu counts waiting threads as work: it needs --threads 1")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()


def _words(flag: str, text: str, known: tuple[str, ...]) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    wrong = [word for word in words if word not in known]
    if wrong:
        raise ConfigError(f"{flag} {wrong[0]!r}: expected some of {', '.join(known)}")
    return words


def _ops(arguments: Namespace, shapes: list[Shape]) -> list[Section]:
    names = arguments.op.split(",")
    rows = [measure_op(name, shape, arguments.rounds, arguments.clock) for shape in shapes for name in names]
    return [Section("Single ops", rows)]


def _sections(arguments: Namespace, shapes: list[Shape], precisions: list[str]) -> list[Section]:
    wanted = _words("--sections", arguments.sections, SECTIONS)
    sections, rounds = [], arguments.rounds
    if "steps" in wanted:
        rows = [measure_step(shape, p, rounds, arguments.clock) for p in precisions for shape in shapes]
        sections.append(Section(f"Steps, {torch.get_num_threads()} threads", rows, STEP_NOTES))
    if "threads" in wanted:
        most = max(arguments.threads or 1, os.cpu_count() or 1)
        table = threads_table(THREADED_SHAPES, precisions[0], rounds, most)
        sections.append(Section("From one thread to all", table, THREAD_NOTES))
    if "ranks" in wanted:
        table = ranks_table(["M", "L"], rounds)
        sections.append(Section("Two ranks, one thread each", table, RANK_NOTES))
        sections.append(Section("What a rank holds and sends", memory_table("M"), MEMORY_NOTES))
    if "lengths" in wanted:
        table = lengths_table(precisions[0], max(1, rounds // 3), arguments.clock)
        sections.append(Section("The same tokens in shorter and longer rows", table, LENGTH_NOTES))
    return sections


def _write(path: Path, text: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path}: cannot be written: {error.strerror}") from None
