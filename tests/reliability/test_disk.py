"""Promise 2, on the real command line: every call to the disk fails once, or is the last thing the process does."""

from __future__ import annotations

import errno
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.marks import slow
from tests.reliability.forked import ForkServer, Plan
from tests.reliability.judge import acknowledged, difference, same_training
from tests.reliability.promises import Trials
from tests.reliability.test_kills import what_a_kill_left
from tests.runs import flags, token_file

RUN = ["--steps", 3, "--save-every", 1, "--val-every", 2, "--keep-last", 1, "--resume", "auto"]


def run_of(folder: Path, *more: object) -> list[str]:
    """The run in `folder`, on tokens of its own: what a run keeps beside them is written anew, by the same calls."""
    home = folder.with_name(f"{folder.name}-data")
    home.mkdir(exist_ok=True)
    return flags(folder, token_file(home), *RUN, *more)


@pytest.fixture
def uncut(server: ForkServer, tmp_path: Path) -> tuple[Path, list[str]]:
    """The run whose disk works, and the names of its disk calls."""
    calls = tmp_path / "calls"
    assert server.run(run_of(tmp_path / "uncut"), Plan(disk_calls=str(calls))).code == 0
    return tmp_path / "uncut", calls.read_text().split()


@pytest.mark.parametrize("stride", [61, slow(1)])
def test_a_kill_before_and_after_any_call(
    stride: int,
    server: ForkServer,
    uncut: tuple[Path, list[str]],
    tmp_path: Path,
    trials: Callable[[int], Trials],
) -> None:
    counted, (straight, calls) = trials(2), uncut
    second_name = len(calls) - 1 - calls[::-1].index("link")  # the save is there as latest, and not yet as best
    for n in sorted({*range(0, len(calls), stride), second_name}):
        for action in ("kill-before", "kill-after"):
            folder = tmp_path / f"{n}-{action}"
            run = run_of(folder)
            ended = server.run(run, Plan(disk_call=n, disk_action=action))
            problem = None if ended.code == -signal.SIGKILL else f"exit {ended.code}: {ended.output}"
            problem = problem or what_a_kill_left(folder)
            again = server.run(run)
            problem = problem or (again.output if again.code else difference(straight, folder))
            counted.add(problem and f"{action} call {n} ({calls[n]}): {problem}")
    counted.finish()


@pytest.mark.parametrize("stride", [89, slow(1)])
@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_any_call_may_fail_and_the_run_stops_or_goes_on_as_asked(
    policy: str,
    code: int,
    stride: int,
    server: ForkServer,
    uncut: tuple[Path, list[str]],
    tmp_path: Path,
    trials: Callable[[int], Trials],
) -> None:
    counted, (straight, calls) = trials(2), uncut
    for n in sorted({0, *range(code % stride, len(calls), stride)}):
        folder = tmp_path / f"{n}"
        run, reached = run_of(folder, "--on-save-error", policy), tmp_path / f"{n}-calls"
        ended = server.run(run, Plan(disk_call=n, disk_action=code, disk_calls=str(reached)))
        problem = None if ended.code in (0, 1) else f"exit {ended.code}"
        if reached.read_text().split()[: n + 1] != calls[: n + 1]:
            problem = "other calls than those of the run whose disk works: the one meant was not made to fail"
        if "Traceback" in ended.output:
            problem = "a traceback"
        if ended.code == 1 and ended.output.count("protomamba: ") != 1:
            problem = "not one line"
        problem = problem or what_a_kill_left(folder)
        promised = acknowledged(folder)
        # Going on without a save that failed leaves another best.safetensors than the uncut run has.
        compare = difference if policy == "stop" else same_training
        again = server.run(run)
        problem = problem or (again.output if again.code else compare(straight, folder))
        counted.add(problem and f"call {n} ({calls[n]}), step {promised}: {problem}; said: {ended.output[-300:]}")
    counted.finish()
