"""The figures of runs and what differs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from protomamba.cli.main import main
from protomamba.report.figures import at_equal, best_validation, changed, differences, figures, status
from protomamba.report.record import read_run, read_runs
from tests.report.synthetic import start_line, train_line, validation_line, whole_run, write_run


def test_figures_of_a_run(tmp_path: Path) -> None:
    found = figures(read_run(whole_run(tmp_path, 100)))
    assert found["status"] == "done" and found["steps"] == 100 and found["parameters"] == 4880
    assert found["train loss, last"] == pytest.approx(1.4) and found["working time, s"] == 10.0
    assert found["best validation, step"] == 100 and found["val_nll, best"] == pytest.approx(1.65)
    assert found["tokens/s, median"] == 40_318.5 and found["checkpoint, bytes"] == 3 << 20


def test_the_best_goes_by_nll_where_there_is_one(tmp_path: Path) -> None:
    lines = [validation_line(s, s, val_loss=loss, val_nll=nll) for s, loss, nll in ((1, 3, 2), (2, 2, 1), (3, 1, 1.5))]
    assert best_validation(read_run(write_run(tmp_path / "a", lines)))["best validation, step"] == 2
    without = [{key: value for key, value in line.items() if key != "val_nll"} for line in lines]
    assert best_validation(read_run(write_run(tmp_path / "b", without)))["best validation, step"] == 3


def test_runs_of_other_speed_are_compared_at_equal_steps_and_times(tmp_path: Path) -> None:
    fast = [start_line(), validation_line(10, 10.0, val_nll=3.0), validation_line(20, 20.0, val_nll=2.0)]
    slow = [start_line(), validation_line(10, 30.0, val_nll=2.5)]
    runs = [write_run(tmp_path / "fast", fast), write_run(tmp_path / "slow", slow)]
    assert at_equal(read_runs(runs)) == {"val_nll at step 10": [3.0, 2.5], "val_nll after 20 s": [2.0, None]}


def test_a_killed_run_says_so(tmp_path: Path) -> None:
    record = read_run(write_run(tmp_path, [start_line(), train_line(7, 1.0)]))
    assert status(record) == "no end written: running or killed, step 7 of 100"


def test_settings_that_differ(tmp_path: Path) -> None:
    runs = [
        whole_run(tmp_path / "a", 10, {"lr": 0.1, "out_dir": "a", "optimizer": {"name": "adamw", "beta1": 0.9}}),
        whole_run(tmp_path / "b", 10, {"lr": 0.2, "out_dir": "b", "optimizer": {"name": "adamw"}}),
    ]
    records = read_runs(runs)
    assert differences(records) == {"lr": [0.1, 0.2], "optimizer.beta1": [0.9, "-"]}
    assert differences(records, "environment") == {}
    assert changed({"lr": 0.1, "head": "hpn", "steps": 3}) == {"lr": 0.1, "steps": 3}


def test_compare_prints_a_table_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [str(whole_run(tmp_path / "a", 100, {"lr": 0.1})), str(whole_run(tmp_path / "b", 400, {"lr": 0.2}))]
    assert main(["compare", *runs]) == 0
    lines = {line.split("  ")[1].strip(): line.split() for line in capsys.readouterr().out.splitlines() if "  " in line}
    assert lines["steps"][-4:] == ["100", "400", "+300.0", "%"] and lines["lr"][-2:] == ["0.1", "0.2"]
    assert main(["compare", "--json", *runs]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["config"] == {"lr": [0.1, 0.2]} and document["runs"]["b"]["steps"] == 400
    assert main(["compare", runs[0]]) == 2
    assert "expected two runs or more, got 1" in capsys.readouterr().err
