"""A clock that is set back by a year during a run: no number, no order of checkpoints and no lock depends on it."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.reliability.judge import difference
from tests.reliability.promises import Trials
from tests.runs import token_file, train

YEAR = 365 * 86_400


def test_a_clock_set_back_changes_no_number(
    tmp_path: Path, trials: Callable[[int], Trials], monkeypatch: pytest.MonkeyPatch
) -> None:
    counted, tokens, run = trials(7), token_file(tmp_path), tmp_path / "run"
    more = ["--save-every", 1, "--keep-last", 2, "--val-every", 2]
    assert train(tmp_path / "uncut", tokens, "--steps", 8, *more) == 0
    calls, real = 0, time.time

    def stepping() -> float:
        nonlocal calls
        calls += 1
        return real() - (YEAR if calls > 9 else 0)

    monkeypatch.setattr(time, "time", stepping)
    assert train(run, tokens, "--steps", 8, *more) == 0
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    times = [event["time"] for event in events]
    assert times[0] - times[-1] > YEAR / 2, "the clock was not set back"
    assert all(event.get("tokens_per_s", 1) > 0 and event.get("save_ms", 0) >= 0 for event in events)
    kept = sorted(path.name for path in run.glob("*.safetensors"))
    assert kept == sorted(path.name for path in (tmp_path / "uncut").glob("*.safetensors"))
    counted.add(difference(tmp_path / "uncut", run))
    monkeypatch.setattr(time, "time", lambda: real() - 2 * YEAR)
    assert train(run, tokens, "--resume", "auto", "--steps", 2) == 0  # the lock of the future is no lock
    counted.finish()
