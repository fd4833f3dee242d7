"""The save/load probe as a command: it holds for our models, sees what is not saved, and touches no run folder."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tests.runs import TINY, token_file, train
from torch import Tensor

from protomamba.cli.main import main
from protomamba.config import ModelConfig
from protomamba.model.heads import SoftmaxHead
from protomamba.parity.report import Report
from protomamba.parity.resume import check_frozen, compare_parts, compare_steps


class ForgetfulHead(SoftmaxHead):
    """Turns its loss a little with every call, and does not save how often it was called."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(z_BLD, targets_BL) * (1 + 0.01 * self.calls)


def probe(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], *more: object
) -> tuple[int, dict[str, dict[str, object]]]:
    tokens = token_file(tmp_path)
    code = main(["parity", "resume", *TINY, "--token-file", str(tokens), "--json", *map(str, more)])
    shown = json.loads(capsys.readouterr().out)
    assert shown["ok"] == (code == 0)
    return code, {row["name"]: row for row in shown["rows"]}


def test_a_resumed_run_is_the_uncut_one_and_frozen_layers_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    more = ("--target-layers", 3, "--placement", "specific:0,2", "--freeze", "first:1", "--prefetch-workers", 2)
    out = tmp_path / "mine"
    train(out, token_file(tmp_path), "--steps", 4)
    before = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    capsys.readouterr()
    code, rows = probe(tmp_path, capsys, *more, "--out-dir", out, "--probe-steps", 3)
    assert code == 0 and all(row["worst"] == 0 for row in rows.values())
    assert rows["frozen that moved"]["note"] == "10 parameters"
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_state_that_is_not_saved_is_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "tests.parity.test_resume_probe:ForgetfulHead"
    code, rows = probe(tmp_path, capsys, "--head", head, "--probe-steps", 2)
    assert code == 1 and rows["steps that differ"]["worst"] == 2 and rows["model that differ"]["worst"] > 0
    assert "first different: 3" in str(rows["steps that differ"]["note"])
    assert rows["stream that differ"]["ok"]


def test_the_comparisons_see_single_bits() -> None:
    report = Report("seen")
    state = {"model": {"w": torch.tensor([0.0, 1.0])}, "rng": {"state": [1, {"x": torch.tensor(2)}]}}
    other = {"model": {"w": torch.tensor([-0.0, 1.0])}, "rng": {"state": [1, {"x": torch.tensor(2)}]}, "new": {"a": 1}}
    compare_parts(report, state, state)
    assert report.ok and [row.name for row in report.rows] == ["model that differ", "rng that differ"]
    compare_parts(report, state, other)
    assert [row.ok for row in report.rows[2:]] == [False, False, True]  # model, new, rng
    nan = [{"step": 6, "loss": float("nan")}]
    compare_steps(report, nan, [{"step": 6, "loss": float("nan")}])
    assert report.rows[-1].ok
    compare_steps(report, nan, [{"step": 6, "loss": 1.0}])
    compare_steps(report, nan, [])
    compare_steps(report, [], [])
    check_frozen(report, ["w"], state["model"], {"uncut": state["model"], "resumed": other["model"]})
    assert not any(row.ok for row in report.rows[-4:]) and report.rows[-1].note.endswith("first moved: w (resumed)")


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--resume", "auto"], 2, "leave --resume out"),
        (["--steps", "9"], 2, "needs 10"),
        (["--probe-steps", "0"], 2, "--probe-steps 0"),
        (["--lr", "x"], 2, "--lr"),
        (["--token-file", "gone.txt"], 1, "gone.txt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_probed_is_one_line(
    more: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["parity", "resume", *TINY, "--token-file", str(token_file(tmp_path)), *more]) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_all_goes_on_after_a_probe_that_could_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from protomamba.cli import parity as command
    from protomamba.errors import UserError

    def fails(config: object, steps: object) -> Report:
        raise UserError("needs something")

    def holds(config: object, steps: object) -> Report:
        report = Report("good")
        report.check("x", 0, 0)
        return report

    monkeypatch.setattr(command, "PROBES", {"a": ("first", fails), "b": ("second", holds)})
    file = tmp_path / "reports" / "parity.json"
    assert main(["parity", "all", "--json", "--report", str(file)]) == 1
    captured = capsys.readouterr()
    assert captured.err == "protomamba: parity: not run: needs something\n"
    assert captured.out == file.read_text() and [r["title"] for r in json.loads(captured.out)] == ["good"]
    assert main(["parity", "a"]) == 1 and main(["parity", "b"]) == 0


def test_resume_takes_the_weights_shape_where_no_flag_gives_one(tmp_path: Path) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "base", tokens, "--steps", 4) == 0
    common = ["--token-file", str(tokens), "--batch-size", "2", "--seq-len", "8", "--threads", "1", "--preset", "plain"]
    weights = ["--init-from", str(tmp_path / "base" / "latest.safetensors"), "--probe-steps", "2"]
    assert main(["parity", "resume", *common, *weights]) == 0
