"""What is read back from a run folder."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from protomamba.errors import UserError
from protomamba.report.record import read_run, read_runs
from tests.report.synthetic import CONFUSION, start_line, train_line, validation_line, whole_run, write_run

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1"


@pytest.mark.parametrize("name", ["hpn", "softmax", "fixed", "staged", "labels"])
def test_runs_of_0_1_are_read(name: str) -> None:
    record = read_run(FIXTURES / name)
    assert record.last_step == 8 and record.end is not None and record.end["reason"] == "done"
    assert record.series["train.loss"].steps == list(range(1, 9))
    assert record.environment["torch"] == "2.13.0+cpu" and record.config["head"] in ("hpn", "softmax")
    assert record.checkpoints[-1]["step"] == 8


def test_pauses_are_no_working_time(tmp_path: Path) -> None:
    second_start = start_line(1_000.0, step=2, resumed_from="latest.safetensors")
    run = write_run(
        tmp_path, [start_line(), train_line(1, 1.0), train_line(2, 3.0), second_start, train_line(3, 1_004.0)]
    )
    record = read_run(run)
    assert (record.clock.steps, record.clock.values) == ([0, 1, 2, 3], [0.0, 1.0, 3.0, 7.0])
    assert record.warnings == [(2, "resumed from latest.safetensors")] and record.end is None


def test_what_is_not_finite_is_a_warning_and_no_point(tmp_path: Path) -> None:
    bad = train_line(2, 2.0, loss=math.nan, grad_norm=None, skipped_update=True)
    record = read_run(write_run(tmp_path, [start_line(), train_line(1, 1.0), bad, train_line(3, 3.0)]))
    assert record.series["train.loss"].steps == [1, 3] == record.series["train.grad_norm"].steps
    assert record.warnings == [(2, "loss is nan"), (2, "NaN or Inf: update skipped")]


def test_each_split_keeps_its_newest_table(tmp_path: Path) -> None:
    newer = {**CONFUSION, "step": 200, "confusion": [[1, 0, 0], [0, 1, 0], [0, 0, 1]]}
    unnamed = {key: value for key, value in CONFUSION.items() if key != "split"}
    record = read_run(write_run(tmp_path, [start_line(), CONFUSION, newer, unnamed]))
    assert {split: event["step"] for split, event in record.classification.items()} == {"test": 200, "validation": 100}


def test_a_run_being_written_and_events_of_another_version(tmp_path: Path) -> None:
    run = write_run(tmp_path, [start_line(), {"event": "later"}, train_line(1, 1.0), validation_line(1, 1.5)])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b'{"event": "train", "st')
    assert read_run(run).last_step == 1


def test_names_are_the_ends_of_paths_that_differ(tmp_path: Path) -> None:
    runs = [whole_run(tmp_path / name, 10) for name in ("a/lr1/run", "a/lr2/run", "b/lr2/run")]
    assert [record.name for record in read_runs(runs[:2])] == ["lr1/run", "lr2/run"]
    assert [record.name for record in read_runs(runs)] == ["a/lr1/run", "a/lr2/run", "b/lr2/run"]
    assert [record.name for record in read_runs(runs[:1] * 2)] == ["run (1)", "run (2)"]


def test_what_is_no_run_is_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"expected the folder of a run, found no metrics\.jsonl"):
        read_run(tmp_path)
    with pytest.raises(UserError, match="classification: expected 3 x 3 counts"):
        read_run(write_run(tmp_path / "a", [{**CONFUSION, "confusion": [[1, 2]]}]))
    with pytest.raises(UserError, match="event ranking at step 4: expected figures"):
        read_run(write_run(tmp_path / "b", [{"event": "ranking", "step": 4}]))
    (tmp_path / "a" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json: expected the run's configuration as JSON"):
        read_run(tmp_path / "a")
