"""The growth probe: it holds for every placement and layer, on given weights too, and sees each promise broken."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.runs import token_file, train

from protomamba.cli.main import main
from protomamba.model.mixers.base import Block
from protomamba.parity import growth
from protomamba.parity.report import Report
from protomamba.run_config import RunConfig
from protomamba.train.trainer import Trainer

FIELDS = {"d_model": 8, "d_state": 4, "batch_size": 2, "seq_len": 8, "threads": 1, "lr": 1e-2, "base_layers": 2}
PROBE = {**FIELDS, "target_layers": 4, "placement": "append", "freeze": "first:2", "bp_cadence_steps": 1}


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return token_file(tmp_path)


def failed(report: Report) -> set[str]:
    return {row.name for row in report.rows if not row.ok}


@pytest.mark.parametrize("placement", ["append", "prepend", "insert:1", "specific:0,3", "specific:1,2"])
@pytest.mark.parametrize("layer", ["mamba", "compact", "examples.lstm_layer:LSTMLayer"])
def test_all_placements_hold_on_random_weights(layer: str, placement: str, tokens: Path) -> None:
    new = {"append": "2,3", "prepend": "0,1", "insert:1": "1,2"}.get(placement, placement.removeprefix("specific:"))
    old = sorted({0, 1, 2, 3} - set(map(int, new.split(","))))
    freeze = f"indices:{','.join(map(str, old))}"
    config = {**PROBE, "placement": placement, "freeze": freeze, "layer": layer, "token_file": tokens}
    report = growth.run(RunConfig(**config))
    assert report.ok, failed(report)
    assert len(report.rows) == 7 and report.facts["new layers"] == new.replace(",", ", ")
    assert report.facts["moved"].startswith(f"layers {new.replace(',', ', ')}; embedding")


def test_the_documented_defaults_of_growth_and_cadence_hold(tokens: Path) -> None:
    report = growth.run(RunConfig(**FIELDS, token_file=tokens))
    assert report.ok, failed(report)
    assert report.facts["steps"] == "96" and report.facts["moved"].startswith("layers 2, 3, 4, 5; embedding")


@pytest.mark.parametrize("placement", ["append", "prepend", "insert:1", "specific:0,3"])
def test_all_placements_hold_on_trained_weights_and_keep_their_moments(
    placement: str, tokens: Path, tmp_path: Path
) -> None:
    assert train(tmp_path / "base", tokens, "--base-layers", 2, "--target-layers", 2, "--steps", 4) == 0
    grown = {**PROBE, "placement": placement, "freeze": "none", "token_file": tokens}
    report = growth.run(RunConfig(**grown, init_from=tmp_path / "base" / "latest.safetensors"))
    assert report.ok, failed(report)
    assert "old moments that differ" in {row.name for row in report.rows}


def test_the_command_prints_json_and_its_exit_code(tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in PROBE.items()]
    command = ["parity", "growth", *flags, "--token-file", str(tokens), "--json"]
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] and found["facts"]["grown"] == "2 to 4 layers"


@pytest.mark.parametrize(
    ("fields", "says"), [({"steps": 1}, "needs 3"), ({"resume": "auto"}, "leave --resume out")], ids=["steps", "resume"]
)
def test_no_room_and_a_resumed_run_are_refused(fields: dict[str, object], says: str, tokens: Path) -> None:
    with pytest.raises(Exception, match=says):
        growth.run(RunConfig(**PROBE, **fields, token_file=tokens))


def test_a_new_layer_that_speaks_is_seen(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Block, "zero_init_output", lambda self: None)
    report = growth.run(RunConfig(**PROBE, token_file=tokens))
    assert failed(report) == {"outputs that differ", "outputs that differ, token by token", "difference in loss"}


def test_a_layer_that_never_trains_is_seen(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reference crate's way: every parameter of a new layer is zero, so all its gradients are."""

    def all_zero(self: Block) -> None:
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.zero_()

    monkeypatch.setattr(Block, "zero_init_output", all_zero)
    report = growth.run(RunConfig(**{**PROBE, "ff_lr": 0.0, "weight_decay": 0.0}, token_file=tokens))
    assert failed(report) == {"new parameters that do not move"}


def test_a_frozen_parameter_that_moves_is_seen(tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = Trainer.train_step

    def drift(self: Trainer, *batches: Any) -> object:
        stats = step(self, *batches)
        with torch.no_grad():
            self.model.layers[0].mixer.D.add_(1e-3)  # type: ignore[union-attr]
        return stats

    monkeypatch.setattr(Trainer, "train_step", drift)
    report = growth.run(RunConfig(**PROBE, token_file=tokens))
    assert failed(report) == {"frozen parameters that moved"}


def test_lost_moments_and_changed_weights_are_seen(
    tokens: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train(tmp_path / "base", tokens, "--base-layers", 2, "--target-layers", 2, "--steps", 2) == 0
    monkeypatch.setattr("protomamba.train.optim.AdamW.load_state", lambda self, state: None)
    config = RunConfig(**{**PROBE, "freeze": "none"}, token_file=tokens, init_from=tmp_path / "base/latest.safetensors")
    assert failed(growth.run(config)) == {"old moments that differ"}


@pytest.mark.parametrize(
    ("one", "other", "count"),
    [
        (torch.tensor([0.0, 1.0]), torch.tensor([-0.0, 1.0]), 1),
        (torch.tensor([torch.nan]), torch.tensor([torch.nan]), 0),
        (torch.zeros(3), torch.zeros(4), 4),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64), 2),
        (torch.tensor(3), torch.tensor(4), 1),
        (torch.zeros(0), torch.zeros(0), 0),
    ],
)
def test_values_are_compared_bit_by_bit(one: torch.Tensor, other: torch.Tensor, count: int) -> None:
    assert growth.different_values(one, other) == count
