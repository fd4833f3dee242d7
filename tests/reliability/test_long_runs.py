"""Promise 11: memory and open files of a long run stay where they are after the warm-up."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.forked import ForkServer, Plan
from tests.reliability.promises import Trials
from tests.runs import flags, token_file

GROWTH = 0.01
LONG_STEPS = int(os.environ.get("STEPS", "2000"))  # STEPS=1000000 for a night of it


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("steps", [400, pytest.param(LONG_STEPS, marks=pytest.mark.slow)])
def test_memory_and_files_stay_flat(
    steps: int, workers: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """Training, validating, saving and logging; the file says step, resident bytes and open files each 20 steps."""
    counted, tokens, memory = trials(11), token_file(tmp_path), tmp_path / "memory"
    warm = 200
    run = flags(tmp_path / "run", tokens, "--steps", warm + steps, "--save-every", 50, "--val-every", 50)
    ended = server.run([*run, "--prefetch-workers", workers], Plan(memory=str(memory)))
    assert ended.code == 0, ended.output[-300:]
    rows = [tuple(map(int, line.split())) for line in memory.read_text().splitlines()]
    settled = [row for row in rows if row[0] >= warm]
    assert len(settled) > steps // 20
    first, most = settled[0][1], max(row[1] for row in settled)
    files = [row[2] for row in settled]
    half = len(files) // 2
    # A worker opens a shard for one read, so a count can catch each of them at it; a leak would raise the least count.
    steady = min(files[:half]) == min(files[half:]) and max(files) <= min(files) + workers
    problem = f"resident memory grew from {first:,} to {most:,} bytes" if most > first * (1 + GROWTH) else None
    counted.add(problem or (None if steady else f"open files {sorted(set(files))}"), count=steps)
    # Checkpoints replace each other; metrics.jsonl is all that grows, by its lines.
    kept = {path.name: path.stat().st_size for path in (tmp_path / "run").iterdir()}
    metrics = kept.pop("metrics.jsonl")
    assert metrics < 500 * (warm + steps), metrics
    assert len(kept) < 10 and sum(kept.values()) < 4 << 20, kept
    counted.finish()
