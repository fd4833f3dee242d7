"""Promise 1: SIGKILL at uniformly random moments while saving every step. The run always gets there, to the bit."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from protomamba.checkpoint.folder import find_resumable
from protomamba.errors import UserError
from tests.marks import slow
from tests.reliability.forked import ForkServer
from tests.reliability.judge import acknowledged, broken_lines, difference
from tests.reliability.promises import Trials
from tests.runs import flags, start, token_file

STEPS = 12
MORE = ["--steps", STEPS, "--save-every", 1, "--val-every", 3, "--resume", "auto", "--keep-last", 2]


def what_a_kill_left(folder: Path) -> str | None:
    """None if every acknowledged step is in a readable `latest` and every finished line of the metrics parses."""
    if broken := broken_lines(folder):
        return f"metrics: {broken}"
    promised = acknowledged(folder)
    try:
        found = find_resumable(folder)
    except UserError as error:
        return f"unreadable: {error}"
    if found is None:
        return f"step {promised} was acknowledged and nothing is there" if promised else None
    if found.warnings:
        return f"damaged: {found.warnings}"
    step = found.checkpoint.info["step"]
    return None if step >= promised else f"step {promised} was acknowledged, latest is of {step}"


def uncut_run(server: ForkServer, home: Path, tokens: Path) -> tuple[Path, float]:
    """The run that nobody kills, and how long it takes: kills are spread over that time."""
    seconds = []
    for name in ("warm", "uncut"):
        began = time.monotonic()
        ended = server.run(flags(home / name, tokens, *MORE))
        seconds.append(time.monotonic() - began)
        assert ended.code == 0, ended.output
    return home / "uncut", min(seconds)


@pytest.mark.parametrize("kills", [12, slow(1000)])
def test_kills_at_random_moments(
    kills: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, rng = trials(1), random.Random(kills)
    tokens = token_file(tmp_path)
    uncut, seconds = uncut_run(server, tmp_path, tokens)
    done = number = 0
    while done < kills:
        folder, number = tmp_path / f"run-{number}", number + 1
        while True:
            child = server.start(flags(folder, tokens, *MORE))
            time.sleep(rng.uniform(0, seconds))
            child.send(signal.SIGKILL)
            ended = child.wait()
            if ended.code == 0:
                break
            done += 1
            problem = None if ended.code == -signal.SIGKILL else f"exit {ended.code}: {ended.output}"
            counted.add(problem or what_a_kill_left(folder))
            if done >= kills:
                assert server.run(flags(folder, tokens, *MORE)).code == 0
                break
        if problem := difference(uncut, folder):
            counted.add(f"{folder.name}: {problem}", count=0)
    counted.finish()


@pytest.mark.parametrize("kills", [1, slow(20)])
def test_kills_of_fresh_interpreters(
    kills: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """The same with `python -m protomamba` started anew each time, killed at a random moment once it trains."""
    counted, rng = trials(1), random.Random(kills)
    tokens, folder = token_file(tmp_path), tmp_path / "run"
    more = [*MORE, "--steps", 2000, "--progress", 0]
    for _ in range(kills):
        process = start(flags(folder, tokens, *more))
        assert process.stdout is not None
        next(line for line in process.stdout if line.startswith("step"))
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.communicate()
        counted.add(what_a_kill_left(folder) if process.returncode == -signal.SIGKILL else f"exit {process.returncode}")
    counted.finish()
