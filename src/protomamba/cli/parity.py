"""`protomamba parity PROBE`: the probes by name, each imported when it is run, and what their reports look like."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from protomamba.errors import UserError
from protomamba.parity.report import Report
from protomamba.run_config import RunConfig


class Amount(NamedTuple):
    """How much a probe does, where it is asked: steps before and after, shapes drawn beside the fixed ones."""

    steps: int | None = None
    random_shapes: int = 0


def _resume(config: RunConfig, amount: Amount) -> Report:
    from protomamba.parity.resume import run

    return run(config, amount.steps)


def _growth(config: RunConfig, amount: Amount) -> Report:
    from protomamba.parity.growth import run

    return run(config, amount.steps)


def _kernels(config: RunConfig, amount: Amount) -> Report:
    from protomamba.parity.kernels import run

    return run(config.seed, amount.random_shapes)


def _jax(config: RunConfig, amount: Amount) -> Report:
    from protomamba.parity.jax_check import run_all

    return run_all(config.seed)


def _transformers(config: RunConfig, amount: Amount) -> Report:
    from protomamba.parity.transformers_check import run

    return run(config.seed)


# name -> (one line, work); each takes the flags of `train` and an Amount, and uses what concerns it.
PROBES: dict[str, tuple[str, Callable[[RunConfig, Amount], Report]]] = {
    "resume": ("a run saved and resumed in a fresh process, compared to the bit with an uninterrupted one", _resume),
    "growth": (
        "a model grown and trained: growth keeps the outputs to the bit, every new parameter moves, no frozen one does",
        _growth,
    ),
    "kernels": ("values and gradients of every native op against its float64 reference, at every CPU level", _kernels),
    "jax": ("model, gradients and updates against a JAX implementation (needs jax)", _jax),
    "transformers": (
        "weights exported and imported again, with equal results on both sides (needs transformers)",
        _transformers,
    ),
}


def parity(name: str, config: RunConfig, amount: Amount, *, as_json: bool, report_file: Path | None) -> int:
    """Run the probe `name`, or `all`, and print what it found. Exit code 0 if everything holds, else 1.

    `all` runs every probe, also after one that could not be run, and says so at the end. Raises UserError.
    """
    chosen = list(PROBES) if name == "all" else [name]
    reports: list[Report] = []
    errors: list[UserError] = []
    for each in chosen:
        try:
            report = PROBES[each][1](config, amount)
        except UserError as error:
            if name != "all":
                raise
            errors.append(error)
            continue
        reports.append(report)
        if not as_json:
            report.print()
    found = [report.to_json() for report in reports]
    content = json.dumps(found[0] if name != "all" else found, indent=2) + "\n"
    if as_json:
        sys.stdout.write(content)
    if report_file:
        _write(report_file, content)
    for failure in errors:
        print(f"protomamba: parity: not run: {failure}", file=sys.stderr)
    return 0 if all(report.ok for report in reports) and not errors else 1


def _write(path: Path, content: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--report {path}: cannot be written: {error.strerror}") from None
