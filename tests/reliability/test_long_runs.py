"""Promise 11: memory, open files, threads and the folder of a long run stay where they are after the warm-up."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from protomamba import Callback
from protomamba.train.run import Run
from protomamba.train.trainer import StepStats
from tests.marks import slow
from tests.reliability.forked import ForkServer, Plan
from tests.reliability.promises import Trials
from tests.runs import flags, metrics, token_file

GROWTH = 0.01
FOLDER_BYTES = 4 << 20
LONG_STEPS = int(os.environ.get("STEPS", "2000"))  # STEPS=1000000 for an hour or two of it
WARM = 200


class Grower(Callback):
    """One layer more when three quarters of the steps are done."""

    def on_step(self, run: Run, stats: StepStats) -> None:
        if stats.step == run.trainer.config.steps * 3 // 4:
            run.trainer.grow(run.trainer.model.config.n_layer + 1)


class Follower(threading.Thread):
    """Reads metrics.jsonl as `tail -f` does, and the size of all else in the folder, while the run writes."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder, self.ended = folder, threading.Event()
        self.lines, self.problem, self.most, self._rest, self._at = 0, "", 0, b"", 0

    def run(self) -> None:
        while not self.problem:
            last = self.ended.wait(0.2)
            self._look()
            if last:
                break

    def _look(self) -> None:
        file = self.folder / "metrics.jsonl"
        if not file.exists():
            return
        with open(file, "rb") as opened:
            opened.seek(self._at)
            new = opened.read()
        self._at += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        self.lines += len(lines)
        self.problem = next((f"line {line[:80]!r}" for line in lines if not _is_event(line)), "")
        self.most = max(self.most, sum(kept(self.folder).values()))


def _is_event(line: bytes) -> bool:
    try:
        return "event" in json.loads(line)
    except ValueError:
        return False


def kept(folder: Path) -> dict[str, int]:
    """The size of each file of a run but metrics.jsonl, which is all that grows, by its lines."""
    found = {}
    for entry in os.scandir(folder):
        try:
            found[entry.name] = entry.stat().st_size
        except FileNotFoundError:  # replaced at this moment
            continue
    found.pop("metrics.jsonl", None)
    return found


def grown(rows: list[tuple[int, ...]], workers: int) -> str | None:
    """What grew over rows of step, resident bytes, open files and threads."""
    first, most = rows[0][1], max(row[1] for row in rows)
    if most > first * (1 + GROWTH):
        return f"resident memory grew from {first:,} to {most:,} bytes"
    half = len(rows) // 2
    for what, column in (("open files", 2), ("threads", 3)):
        counts = [row[column] for row in rows]
        # A worker opens a shard for one read, so a count can catch each at it; a leak would raise the least count.
        if min(counts[:half]) != min(counts[half:]) or max(counts) > min(counts) + workers:
            return f"{what} {sorted(set(counts))}"
    return None


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [400, slow(2000)])
def test_memory_and_files_stay_flat(
    steps: int, workers: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """Training, validating, saving and logging; the file says step, bytes, open files and threads each 20 steps."""
    counted, tokens, memory = trials(11), token_file(tmp_path), tmp_path / "memory"
    run = flags(tmp_path / "run", tokens, "--steps", WARM + steps, "--save-every", 50, "--val-every", 50)
    ended = server.run([*run, "--prefetch-workers", workers], Plan(memory=str(memory)))
    assert ended.code == 0, ended.output[-300:]
    rows = rows_of(memory)
    assert len(rows) > steps // 20
    counted.add(grown(rows, workers), count=steps)
    size, files = (tmp_path / "run" / "metrics.jsonl").stat().st_size, kept(tmp_path / "run")
    assert size < 500 * (WARM + steps) and len(files) < 10 and sum(files.values()) < FOLDER_BYTES, (size, files)
    counted.finish()


def rows_of(memory: Path) -> list[tuple[int, ...]]:
    """The rows behind the warm-up."""
    rows = [tuple(map(int, line.split())) for line in memory.read_text().splitlines()]
    return [row for row in rows if row[0] >= WARM]


@pytest.mark.slow
def test_a_million_steps(server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    """STEPS of them: backpropagation on every tenth, 50 between saves and validations, a layer grown on the way.

    The growth needs memory of its own (a layer, its moments), so that each side of it is held to the promise alone.
    """
    counted, tokens, memory, folder = trials(11), token_file(tmp_path), tmp_path / "memory", tmp_path / "run"
    often = ["--save-every", 50, "--val-every", 50, "--log-every", 10, "--bp-cadence-steps", 10]
    run = flags(folder, tokens, "--steps", LONG_STEPS, *often, "--callback", f"{__name__}:Grower")
    follower = Follower(folder)
    follower.start()
    ended = server.run(run, Plan(memory=str(memory)))
    follower.ended.set()
    follower.join()
    assert ended.code == 0, ended.output[-300:]
    rows, growth = rows_of(memory), LONG_STEPS * 3 // 4
    assert rows[-1][0] == LONG_STEPS
    for side in ([row for row in rows if row[0] <= growth], [row for row in rows if row[0] > growth + WARM]):
        counted.add(grown(side, workers=0), count=side[-1][0] - side[0][0])
        print(
            f"steps {side[0][0]:,}-{side[-1][0]:,}: {side[0][1:]} to {side[-1][1:]}, most {max(r[1] for r in side):,}"
        )
    counted.add(follower.problem or None, count=0)
    counted.finish()
    assert follower.lines == len(metrics(folder)) > LONG_STEPS // 10 and follower.most < FOLDER_BYTES
    assert len(kept(folder)) < 10, kept(folder)
    print(f"folder at most {follower.most:,} bytes beside metrics.jsonl, {follower.lines:,} lines")
