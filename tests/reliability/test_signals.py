"""Promise 5: SIGTERM and SIGINT at random moments: saved, exit 75 within the step in flight; a second ends at once."""

from __future__ import annotations

import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from protomamba.checkpoint import file as checkpoint
from tests.marks import slow
from tests.reliability.forked import ForkServer, Plan
from tests.reliability.judge import acknowledged, broken_lines
from tests.reliability.promises import Trials
from tests.runs import flags, metrics, token_file

LONG = ["--steps", 1_000_000, "--save-every", 7, "--val-every", 5, "--resume", "auto"]


def what_a_signal_left(folder: Path, sent: float) -> str | None:
    """None if the run saved the step that was in flight when the signal came, and did no other."""
    if broken := broken_lines(folder):
        return f"metrics: {broken}"
    end = metrics(folder)[-1]
    if (end["event"], end.get("reason")) != ("end", "signal"):
        return f"last line: {end}"
    if not end["step"] == acknowledged(folder) == checkpoint.load(folder / "latest.safetensors").info["step"]:
        return f"ended at step {end['step']}, acknowledged {acknowledged(folder)}"
    # A line's time is rounded to milliseconds.
    after = [line["step"] for line in metrics(folder, "train") if line["time"] > sent + 0.001]
    return f"steps {after} were done after the signal" if len(after) > 1 else None


@pytest.mark.parametrize("count", [10, slow(200)])
def test_a_signal_at_a_random_moment(
    count: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """One run goes on from signal to signal; what it holds in the end is the sum of all parts (promise 4)."""
    counted, rng, tokens = trials(5), random.Random(count), token_file(tmp_path)
    folder = tmp_path / "run"
    for number in range(count):
        child = server.start([*flags(folder, tokens, *LONG), "--prefetch-workers", rng.choice([0, 0, 1, 4])])
        child.wait_until("\nstep ")
        time.sleep(rng.uniform(0, 0.15))
        kind = rng.choice([signal.SIGTERM, signal.SIGINT])
        child.send(kind)
        sent = time.time()
        ended = child.wait()
        problem = what_a_signal_left(folder, sent) if ended.code == 75 else f"exit {ended.code}: {ended.output[-300:]}"
        if problem is None and f"{kind.name}: finishing this step and saving" not in ended.output:
            problem = "nothing was said"
        counted.add(problem and f"trial {number}, {kind.name}: {problem}")
    assert [line["step"] for line in metrics(folder, "train")] == list(range(1, acknowledged(folder) + 1))
    counted.finish()


@pytest.mark.parametrize("count", [2, slow(40)])
def test_a_second_signal_ends_a_save_that_hangs(
    count: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """The disk hangs in the save after the first signal. The second ends the process; the earlier checkpoint stands."""
    counted, rng, tokens = trials(5), random.Random(count), token_file(tmp_path)
    for number in range(count):
        folder, marker = tmp_path / f"{number}", tmp_path / f"{number}-stalled"
        child = server.start(flags(folder, tokens, *LONG, "--save-every", 1), Plan(stall=str(marker)))
        child.wait_until("\nstep ")
        child.wait_until("       2")
        time.sleep(rng.uniform(0, 0.1))
        first, second = (rng.choice([signal.SIGTERM, signal.SIGINT]) for _ in range(2))
        child.send(first)
        # A signal in the middle of a save that has begun lets that one finish, and there is no other: it ends in order.
        while not marker.exists() and "stopped by a signal" not in child.said():
            time.sleep(0.001)
        hung = marker.exists()
        child.send(second)
        ended = child.wait()
        promised = acknowledged(folder)
        there = checkpoint.load(folder / "latest.safetensors").info["step"]
        problem = None if ended.code in ((-second,) if hung else (75, -second)) else f"exit {ended.code}"
        counted.add(problem or (None if 1 <= promised <= there else f"acknowledged {promised}, there {there}"))
    counted.finish()


@pytest.mark.parametrize("count", [6, slow(100)])
def test_signals_while_it_starts(
    count: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """From the first moment on: either the system's own end, before there is anything to save, or saved and 75."""
    counted, rng, tokens = trials(5), random.Random(count), token_file(tmp_path)
    for number in range(count):
        folder = tmp_path / f"{number}"
        child = server.start(flags(folder, tokens, *LONG))
        time.sleep(rng.uniform(0, 0.06))
        kind = rng.choice([signal.SIGTERM, signal.SIGINT])
        child.send(kind)
        ended = child.wait()
        if ended.code == 75:
            problem = None if acknowledged(folder) >= 1 else "nothing was saved"
        else:
            interrupted = (-kind, 130) if kind == signal.SIGINT else (-kind,)
            problem = None if ended.code in interrupted else f"exit {ended.code}: {ended.output[-300:]}"
            problem = problem or ("a checkpoint is there" if (folder / "latest.safetensors").exists() else None)
        counted.add(problem and f"trial {number}: {problem}")
    counted.finish()
