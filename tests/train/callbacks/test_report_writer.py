"""The report that a run leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.runs import metrics, token_file, train

from protomamba.train.callbacks import report


def test_a_run_leaves_its_report_unless_told_not_to(tmp_path: Path) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "run", tokens, "--steps", 8) == 0
    page = (tmp_path / "run" / "report.html").read_text()
    assert "<b>done</b>" in page and "Gradient norm" in page
    assert train(tmp_path / "bare", tokens, "--steps", 4, "--write-report", 0) == 0
    assert not (tmp_path / "bare" / "report.html").exists()


def test_a_report_that_fails_is_told_and_the_run_is_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(folders: object, out: Path) -> Path:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(report, "write_report", broken)
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 4) == 0
    assert "no report.html: ZeroDivisionError: a bug; protomamba report" in capsys.readouterr().out
    assert metrics(tmp_path / "run", "end")[0]["reason"] == "done"
