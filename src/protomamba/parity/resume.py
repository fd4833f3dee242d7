"""`protomamba parity resume`: save, load in a fresh process, go on, and compare to the bit, on one's own configuration.

One run goes straight through 2k steps and saves at step k. A new process resumes that checkpoint through the path that
`--resume` takes and runs to 2k as well. Everything the two then hold must be the same. All of it happens in a temporary
folder.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from protomamba.bits import same
from protomamba.checkpoint import file as checkpoint
from protomamba.errors import ConfigError, UserError
from protomamba.metrics_file import read_metrics
from protomamba.parity.report import Report, versions
from protomamba.run_config import RunConfig
from protomamba.train.build import build_run, load_named_code
from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.console import Console
from protomamba.train.resume import Resumed, find_resume
from protomamba.train.run import Run
from protomamba.train.signals import StopRequest
from protomamba.train.trainer import StepStats

DEFAULT_STEPS = 5
UNCUT, RESUMED = "uncut.safetensors", "latest.safetensors"
_CLOCKS = {"tokens_per_s", "step_ms", "time"}


def run(config: RunConfig, steps: int | None = None) -> Report:
    """Probe a configuration: `steps` before the save and as many after it.

    Without `steps`: 5, or as many as it takes for one to backpropagate. Raises ConfigError where the configuration has
    no room for them, UserError where training fails.
    """
    steps = steps or max(DEFAULT_STEPS, config.bp_cadence_steps)
    if config.resume is not None:
        raise ConfigError("parity resume starts runs of its own: leave --resume out (--init-from gives it weights)")
    if config.steps < 2 * steps:
        raise ConfigError(f"--steps {config.steps}: the probe needs {2 * steps}, twice --probe-steps {steps}")
    with tempfile.TemporaryDirectory(prefix="protomamba-parity-") as scratch:
        config = config.replace(out_dir=Path(scratch), save_every=steps, val_every=steps, log_every=1, keep_last=1)
        return _probe(config, steps)


def _probe(config: RunConfig, steps: int) -> Report:
    folder = config.out_dir
    start = _start(config, None, last=2 * steps)
    model = start.trainer.model
    initial = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    frozen = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    start.fit()
    # The uncut result and its lines go aside: the second run writes to the same folder, as a resumed run does.
    (folder / RESUMED).rename(folder / UNCUT)
    uncut_lines = _train_lines(folder, after=steps)
    _resume_in_fresh_process(folder / f"step-{steps:08d}.safetensors", 2 * steps, config)
    uncut, resumed = checkpoint.load(folder / UNCUT).parts, checkpoint.load(folder / RESUMED).parts
    report = Report("resume", facts={**versions("torch"), "steps": f"{steps} + {steps}", "seed": str(config.seed)})
    compare_steps(report, uncut_lines, _train_lines(folder, after=steps))
    compare_parts(report, uncut, resumed)
    check_frozen(report, frozen, initial, {"uncut": uncut["model"], "resumed": resumed["model"]})
    moved = sum(not same(initial[name], uncut["model"][name]) for name in initial)
    report.facts["moved"] = f"{moved} of {len(initial)} parameters"
    return report


class _StopAt(Callback):
    """Asks the run to stop, as a signal would, once it has done `last` steps."""

    def __init__(self, last: int) -> None:
        self.last = last

    def on_step(self, run: Run, stats: StepStats) -> None:
        if stats.step >= self.last:
            run.stop("signal")


def _start(config: RunConfig, resumed: Resumed | None, last: int) -> Run:
    silent = Console(io.StringIO(), progress=False)
    return build_run(config, resumed, StopRequest(), silent, [_StopAt(last)])


def _resume_in_fresh_process(path: Path, last: int, config: RunConfig) -> None:
    """Go on from `path` to step `last` in a new interpreter; UserError with its last line where it fails."""
    # The same places to import from: a layer or head of the user's own may be on any of them.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(place or os.curdir for place in sys.path)}
    command = [sys.executable, "-m", "protomamba.parity.resume", str(path), str(last), config.layer, config.head]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode != 0:
        said = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise UserError(f"parity resume: the resumed run failed (exit {done.returncode}): {said[0]}")


def main(path: str, last: int, layer: str, head: str) -> int:
    """What the fresh process does: resume as `protomamba train --resume PATH` does, up to step `last`."""
    config = RunConfig(resume=path, layer=layer, head=head)
    load_named_code(config)
    resumed = find_resume(config)
    if resumed is None:
        raise UserError(f"{path}: nothing to resume")
    _start(resumed.config, resumed, last).fit()
    return 0


def _train_lines(folder: Path, after: int) -> list[dict[str, Any]]:
    """The train events past step `after`, without what a clock has written into them."""
    events = read_metrics(folder / "metrics.jsonl")
    lines = [event for event in events if event["event"] == "train" and event["step"] > after]
    return [{key: value for key, value in line.items() if key not in _CLOCKS} for line in lines]


def compare_steps(report: Report, uncut: list[dict[str, Any]], resumed: list[dict[str, Any]]) -> None:
    """One row: in how many steps the loss or any other figure of the step differs; 0 is allowed."""
    different = [line["step"] for line, other in zip(uncut, resumed, strict=False) if repr(line) != repr(other)]
    missing = abs(len(uncut) - len(resumed)) + (not uncut)
    note = f"loss, rate, norms of {len(uncut)} steps" + (f"; first different: {different[0]}" if different else "")
    report.check("steps that differ", len(different) + missing, 0, note)


def compare_parts(report: Report, uncut: Mapping[str, Any], resumed: Mapping[str, Any]) -> None:
    """One row a part of the checkpoint (model, optimizer, stream, ...): in how many values the bits differ."""
    for part in sorted(uncut.keys() | resumed.keys()):
        one, other = dict(_leaves(uncut.get(part))), dict(_leaves(resumed.get(part)))
        different = [
            name
            for name in {**one, **other}
            if name not in one or name not in other or not same(one[name], other[name])
        ]
        kind = "tensors" if any(isinstance(value, Tensor) for value in one.values()) else "values"
        note = f"{len(one)} {kind}" + (f"; first different: {different[0]}" if different else "")
        report.check(f"{part} that differ", len(different), 0, note)


def check_frozen(
    report: Report, frozen: list[str], initial: Mapping[str, Tensor], ends: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """One row, where anything is frozen: how many frozen parameters are not what they were before the first step."""
    moved = [
        f"{name} ({run})" for run, model in ends.items() for name in frozen if not same(initial[name], model[name])
    ]
    if frozen:
        note = f"{len(frozen)} parameters" + (f"; first moved: {moved[0]}" if moved else "")
        report.check("frozen that moved", len(moved), 0, note)


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The tensors and plain values of a nested state, each under its dotted name."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _leaves(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value):
            yield from _leaves(item, f"{name}.{number}")
    else:
        yield name, value


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1], int(sys.argv[2]), *sys.argv[3:]))
    except UserError as error:
        sys.exit(str(error))
