"""The report: what counts as a failure, and that it survives JSON and printing."""

import json
import math

import numpy as np
import pytest
import torch
from rich.console import Console

from protomamba.errors import UserError
from protomamba.kernels.closeness import rms_ratio
from protomamba.parity.report import Report, max_abs, merge


def test_an_empty_report_is_not_a_pass():
    assert not Report("nothing").ok


@pytest.mark.parametrize(
    ("worst", "ok"), [(0.0, True), (1e-4, True), (1.1e-4, False), (math.nan, False), (math.inf, False)]
)
def test_one_bad_row_fails_the_report(worst, ok):
    report = Report("r")
    report.check("good", 0.0, 0.0)
    assert report.check("candidate", worst, 1e-4).ok is ok
    assert report.ok is ok


def test_worst_of_names_the_worst_and_nan_outranks_everything():
    report = Report("r")
    assert report.worst_of("grads", {"a": 1.0, "b": 3.0, "c": 2.0}, 5.0).note == "worst of 3: b"
    row = report.worst_of("grads", {"a": 1.0, "b": math.inf, "c": math.nan, "d": 0.0}, 5.0)
    assert row.note.endswith(("b", "c")) and not row.ok


def test_json_file_has_no_bare_nan(tmp_path):
    report = Report("r", facts={"seed": "1"})
    report.check("broken", math.nan, 1.0)
    report.write(tmp_path / "deep" / "report.json")
    text = (tmp_path / "deep" / "report.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["rows"] == [{"name": "broken", "worst": None, "tolerance": 1.0, "ok": False, "note": ""}]


def test_unwritable_report_says_where(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"report .*file/report\.json"):
        Report("r").write(tmp_path / "file" / "report.json")


def test_table_shows_failures_in_words():
    report = Report("title")
    report.check("one", 0.0, 1e-5)
    report.check("two", 1.0, 1e-5, "layer 3")
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        report.print(console)
        text = console.export_text()
    assert "FAILED" in text and "layer 3" in text and "1 of 2 checks hold" in text


def test_a_narrow_terminal_loses_nothing():
    report = Report("title")
    report.check("export, softmax: greedy tokens that differ", 0.0, 1e-5, "worst of 33: layers.1.mixer.dt_proj.weight")
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    with console.file:
        report.print(console)
        text = console.export_text()
    letters = "".join(line.split("│")[-2].strip() for line in text.splitlines() if "│" in line)
    assert letters.replace(" ", "") == "worstof33:layers.1.mixer.dt_proj.weight"
    assert "0.00e+00" in text and "1e-05" in text and "differ" in text


def test_merge_keeps_every_row_and_names_its_origin():
    one, two = Report("one", facts={"torch": "2"}), Report("two", facts={"jax": "0"})
    one.check("loss", 0.0, 1.0)
    two.check("loss", 2.0, 1.0)
    whole = merge("all", [one, two])
    assert [row.name for row in whole.rows] == ["one: loss", "two: loss"]
    assert whole.facts == {"torch": "2", "jax": "0"} and not whole.ok


def test_distances():
    expected = np.array([3.0, 4.0])
    assert max_abs(torch.tensor([3.0, 4.5]), expected) == 0.5
    assert rms_ratio([3.0, 4.5], expected) == pytest.approx(0.1)
    assert rms_ratio(np.zeros(3), np.zeros(3)) == 0.0
    assert rms_ratio(np.ones(3), np.zeros(3)) == math.inf
    assert max_abs(np.zeros(0), np.zeros(0)) == 0.0
    with pytest.raises(ValueError, match="shapes"):
        max_abs(np.zeros((2, 1)), np.zeros((1, 2)))
    with pytest.raises(ValueError, match="shapes"):
        rms_ratio(np.zeros((2, 1)), np.zeros((1, 2)))
