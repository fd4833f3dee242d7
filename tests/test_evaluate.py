"""eval judges by the measures of the task: ranks beside baselines, a confusion matrix, bits a byte, parts by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from protomamba.cli.main import main
from protomamba.train.validation import bits_per_byte
from tests.runs import metrics

SMALL = ["--d-model", "8", "--steps", "4", "--threads", "1", "--batch-size", "4", "--seq-len", "8"]


def evaluated(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["eval", *arguments, "--json", "--threads", "1"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_events_are_ranked_beside_baselines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"u{u},{t},i{(u + t * (1 + u % 2)) % 7}" for u in range(20) for t in range(6)]
    (tmp_path / "e.csv").write_text("\n".join(["user,time,item", *rows]) + "\n")
    columns = ["--group", "user", "--order", "time", "--item", "item"]
    assert main(["prepare", "events", str(tmp_path / "e.csv"), "--out-dir", str(tmp_path / "data"), *columns]) == 0
    assert main(["train", str(tmp_path / "data"), "--out-dir", str(tmp_path / "run"), *SMALL]) == 0
    shown = capsys.readouterr().out
    assert "held out    model: hit@1" in shown and "held out    popularity: hit@1" in shown
    latest = str(tmp_path / "run" / "latest.safetensors")
    (recorded,) = metrics(tmp_path / "run", "ranking")
    best = evaluated(capsys, str(tmp_path / "run" / "best.safetensors"))["ranking"]
    assert {name: recorded[name] for name in best} == best and recorded["step"] == 4
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Ranking over all items" in page and "ndcg@10" in page and "popularity" in page
    for split, rows_judged in (("valid", 20), ("test", 20), ("train", 80)):
        ranking = evaluated(capsys, latest, "--split", split)["ranking"]
        assert (ranking["rows"], ranking["items"]) == (rows_judged, 7)
        assert set(ranking["baselines"]) == {"popularity", "last_item"}
        assert all(0 <= figure <= 1 for figure in ranking["figures"].values())
        assert ranking["figures"]["hit@10"] == 1.0  # there are 7 items
    assert main(["eval", latest, "--split", "test"]) == 0
    shown = capsys.readouterr().out
    assert "popularity" in shown and "ndcg@10" in shown


def test_labels_are_judged_by_class(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{'ab'[i % 2] * 5},{('yes', 'no')[i % 2]}" for i in range(60)]
    (tmp_path / "t.csv").write_text("\n".join(["text,label", *rows]) + "\n")
    arguments = ["--label", "label", "--text", "text", "--out-dir", str(tmp_path / "data")]
    assert main(["prepare", "labels", str(tmp_path / "t.csv"), *arguments]) == 0
    train = ["train", str(tmp_path / "data"), "--out-dir", str(tmp_path / "run"), "--d-model", "8", "--steps", "30"]
    assert main([*train, "--threads", "1", "--batch-size", "8", "--lr", "0.01"]) == 0
    found = evaluated(capsys, str(tmp_path / "run" / "latest.safetensors"))
    judged = found["classification"]
    (recorded,) = metrics(tmp_path / "run", "classification")
    best = evaluated(capsys, str(tmp_path / "run" / "best.safetensors"))["classification"]
    assert {name: recorded[name] for name in best} == best
    assert "precision" in (tmp_path / "run" / "report.html").read_text()
    assert sorted(judged["classes"]) == ["no", "yes"]
    assert sum(map(sum, judged["confusion"])) == found["targets"]
    hits = sum(judged["confusion"][i][i] for i in range(2))
    assert hits / found["targets"] == pytest.approx(found["accuracy"])
    assert main(["eval", str(tmp_path / "run" / "latest.safetensors")]) == 0
    assert "precision" in capsys.readouterr().out


def test_bits_a_byte_where_text_was_prepared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox. " * 60)
    assert main(["prepare", str(tmp_path / "a.txt"), "--out-dir", str(tmp_path / "data")]) == 0
    assert main(["train", str(tmp_path / "data"), "--out-dir", str(tmp_path / "run"), *SMALL]) == 0
    found = evaluated(capsys, str(tmp_path / "run" / "latest.safetensors"))
    assert found["bits_per_byte"] == pytest.approx(found["nll"] / 0.6931472, rel=0.01)
    (validated,) = metrics(tmp_path / "run", "validation")
    assert validated["val_bits_per_byte"] == pytest.approx(validated["val_nll"] / 0.6931472, rel=0.01)
    (sample,) = metrics(tmp_path / "run", "sample")
    assert sample["prompt"] in "the quick brown fox. " * 60 and sample["text"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Samples" in page and sample["prompt"].strip() in page


def test_a_part_that_is_not_there_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("the quick brown fox. " * 60)
    assert main(["prepare", str(tmp_path / "a.txt"), "--out-dir", str(tmp_path / "data")]) == 0
    assert main(["train", str(tmp_path / "data"), "--out-dir", str(tmp_path / "run"), *SMALL]) == 0
    assert main(["eval", str(tmp_path / "run" / "latest.safetensors"), "--split", "test"]) == 1
    assert "has no test part" in capsys.readouterr().err


def test_bits_per_byte() -> None:
    assert bits_per_byte(None, 1.0) is None and bits_per_byte(0.6931471805599453, 2.0) == pytest.approx(0.5)
