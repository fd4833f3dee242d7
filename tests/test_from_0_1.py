"""What protomamba 0.1.0 wrote (tests/fixtures/v0_1: run folders and checkpoints, made by that version) still loads.

Weights and moments are bit-equal to what the stock safetensors library reads from the file; evaluation gives the
recorded figures; a run goes on from them.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from protomamba import Trainer
from protomamba.bits import same
from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main

FIXTURES = Path(__file__).parent / "fixtures" / "v0_1"
RUNS = ("hpn", "fixed", "softmax", "staged", "labels")
EXPECTED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "expected.json").read_text())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixtures to work in: runs name their token files relative to it."""
    shutil.copytree(FIXTURES, tmp_path / "v0_1")
    monkeypatch.chdir(tmp_path / "v0_1")
    return tmp_path / "v0_1"


@pytest.mark.parametrize("name", [*(f"{run}/{kept}" for run in RUNS for kept in ("latest", "best")), "library"])
def test_weights_and_moments_are_the_files(name: str) -> None:
    path = FIXTURES / f"{name}.safetensors"
    stored: dict[str, Tensor] = load_file(path)
    assert checkpoint.verify(path) == []
    trainer = Trainer.load_checkpoint(path)
    weights = trainer.model.state_dict()
    held = {key.removeprefix("model."): value for key, value in stored.items() if key.startswith("model.")}
    assert len(held) > 5
    for key, value in held.items():
        assert same(weights[key], value), key
    moments = trainer.optimizer.state()
    for key, value in stored.items():
        if key.startswith("optimizer.moments."):
            parameter, _, slot = key.removeprefix("optimizer.moments.").rpartition(".")
            assert same(moments[parameter][slot], value), key


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("kept", ["latest", "best"])
def test_evaluation_gives_the_recorded_figures(
    folder: Path, capsys: pytest.CaptureFixture[str], run: str, kept: str
) -> None:
    assert main(["eval", f"{run}/{kept}.safetensors", "--json", "--threads", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    for key, value in EXPECTED[f"{run}/{kept}"].items():
        assert found[key] == (pytest.approx(value, rel=1e-6, abs=1e-6) if isinstance(value, float) else value), key


def test_a_checkpoint_of_the_library_gives_the_recorded_loss() -> None:
    model = Trainer.load_checkpoint(FIXTURES / "library.safetensors").model.eval()
    ids = torch.arange(64).reshape(4, 16) % 13
    assert float(model(ids, (ids + 1) % 13).detach()) == pytest.approx(EXPECTED["library"]["loss"], rel=1e-6)


@pytest.mark.parametrize("run", RUNS)
def test_a_run_goes_on(folder: Path, run: str) -> None:
    assert main(["train", "--resume", f"{run}/latest.safetensors", "--steps", "3", "--threads", "1"]) == 0
    steps = [json.loads(line) for line in Path(run, "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if line["event"] == "train"] == list(range(1, 12))
    assert checkpoint.read_info(Path(run, "latest.safetensors"))["step"] == 11


def test_a_resume_says_that_learned_prototypes_follow_another_gradient(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = float(Trainer.load_checkpoint("hpn/latest.safetensors").model.state_dict()["head.scale"])
    assert main(["train", "--resume", "hpn/latest.safetensors", "--steps", "1", "--threads", "1"]) == 0
    assert f"head.log_scale starts at log {scale:.4g}, the fitted scale of the weights" in capsys.readouterr().out
    assert main(["train", "--resume", "hpn/latest.safetensors", "--steps", "1", "--threads", "1"]) == 0
    assert "log_scale" not in capsys.readouterr().out
