"""The first hour: a prepared folder as the one argument, sizes from the data, epochs and wall time for a length."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.runs import metrics, token_file, train

from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main
from protomamba.data.source import DataInfo
from protomamba.errors import ConfigError
from protomamba.train import presets
from protomamba.train.budget import Costs, events_within, seconds_of, steps_within
from protomamba.train.callbacks.last_judgement import LastJudgement

SMALL = ["--d-model", "8", "--seq-len", "16", "--batch-size", "2", "--threads", "1", "--eval-batches", "2"]


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog. " * 60)
    assert main(["prepare", str(tmp_path / "a.txt"), "--out-dir", str(tmp_path / "data")]) == 0
    return tmp_path / "data"


def config_of(run: Path) -> dict[str, object]:
    found: dict[str, object] = json.loads((run / "config.json").read_text())
    return found


def test_a_prepared_folder_is_the_one_argument(
    prepared: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert main(["train", str(prepared), "--out-dir", str(run), "--steps", "3", *SMALL]) == 0
    said = capsys.readouterr().out
    assert "preset bytes, from the data" in said and "--lr" in said and "grown from" not in said
    config = config_of(run)
    assert (config["preset"], config["d_model"], config["steps"], config["bp_cadence_steps"]) == ("bytes", 8, 3, 1)
    # The same line once more, and a resume, keep what was derived.
    line = ["train", str(prepared), "--out-dir", str(run), "--steps", "3", *SMALL, "--resume", "auto"]
    assert main(line) == 0 and "already complete" in capsys.readouterr().out
    assert main(["train", "--resume", str(run / "latest.safetensors"), "--steps", "1"]) == 0
    assert config_of(run)["lr"] == config["lr"]
    assert main(["eval", str(run / "latest.safetensors")]) == 0


def test_without_data_nothing_changes(tmp_path: Path) -> None:
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 1) == 0
    assert config_of(tmp_path / "run")["preset"] == "reference"


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--token-file", "x.txt"], 2, "DATA .* and --token-file exclude each other"),
        (["--preset", "classify"], 2, "--preset classify: the data holds sequences without labels"),
        (["--epochs", "2", "--steps", "5"], 2, "--steps and --epochs exclude each other"),
        (["--time-budget", "5 minutes"], 2, "--time-budget '5 minutes': expected text like"),
    ],
)
def test_what_does_not_go_together(
    prepared: Path, tmp_path: Path, more: list[str], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    assert main(["train", str(prepared), "--out-dir", str(tmp_path / "run"), *more]) == code
    assert re.search(says, capsys.readouterr().err)


def test_a_folder_that_is_not_prepared_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", str(tmp_path), "--out-dir", str(tmp_path / "run")]) == 1
    assert "has no manifest.json" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "nowhere"), "--out-dir", str(tmp_path / "run")]) == 1
    assert "there is no such folder" in capsys.readouterr().err


def test_epochs_are_a_length_and_further_epochs_after_a_resume(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main(["train", str(prepared), "--out-dir", str(run), "--epochs", "0.1", *SMALL]) == 0
    steps = checkpoint.read_info(run / "latest.safetensors")["step"]
    assert steps == -(-int(config_of(run)["steps"]) // 1) and 5 < steps < 12  # type: ignore[call-overload]
    assert main(["train", "--resume", str(run / "latest.safetensors"), "--epochs", "0.1"]) == 0
    assert checkpoint.read_info(run / "latest.safetensors")["step"] == 2 * steps


def test_a_wall_time_is_measured_once_and_recorded(prepared: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = ["train", str(prepared), "--out-dir", str(run), "--time-budget", "3s", "--resume", "auto", *SMALL]
    assert main(line) == 0
    steps = config_of(run)["steps"]
    assert metrics(run, "end")[-1]["step"] == steps
    assert main(line) == 0
    assert config_of(run)["steps"] == steps and metrics(run, "end")[-1]["step"] == steps


def test_the_steps_that_fit() -> None:
    assert (seconds_of("90s"), seconds_of("1.5m"), seconds_of("2h")) == (90, 90, 7200)
    costs = Costs(step=0.1, validation=1.0, save=1.0)
    assert steps_within(100.0, costs, 100, 100, 0) == 829  # 99.5 s of 0.12 s each
    assert steps_within(100.0, costs, None, None, 5) == 895
    assert steps_within(100.0, replace(costs, judgement=9.0), None, None, 5) == 805
    assert steps_within(1000.0, costs, None, None, 0) == 9950
    assert events_within(100.0, costs, 20) == 10 and events_within(1e6, costs, 20) == 20
    assert events_within(1.0, costs, 20) == 1
    with pytest.raises(ConfigError, match="too short"):
        steps_within(1.0, Costs(2.0, 0.0, 0.0), 10, 10, 0)


@pytest.mark.parametrize("count", [1, 3, 30])
def test_the_judgement_at_the_end_is_extrapolated_from_few_batches(monkeypatch: pytest.MonkeyPatch, count: int) -> None:
    timed = list[int]()
    monkeypatch.setattr(LastJudgement, "_batches", lambda self, model: range(count))
    monkeypatch.setattr(LastJudgement, "_timed", lambda self, model, few: (timed.append(len(few)), 2 + len(few) / 2)[1])
    assert LastJudgement(None, None).seconds(None) == pytest.approx(2 + count / 2)  # type: ignore[arg-type]
    assert max(timed) <= 5


@pytest.mark.parametrize("targets", [1_000, 10_000_000, 10**9])
def test_derived_sizes_grow_with_the_data(targets: int) -> None:
    found = presets.derive("bytes", DataInfo(vocab_size=257, targets=targets))
    assert found["d_model"] == {1_000: 64, 10_000_000: 128, 10**9: 512}[targets]
    assert presets.FEWEST_STEPS <= found["steps"] <= presets.MOST_STEPS
    assert found["batch_size"] * found["seq_len"] == presets.TOKENS_A_STEP


def test_labelled_sequences_are_rows_as_long_as_the_longest() -> None:
    found = presets.derive("classify", DataInfo(vocab_size=9, n_class=3, longest=40, targets=200))
    assert found["seq_len"] == 40 and found["batch_size"] == 51
