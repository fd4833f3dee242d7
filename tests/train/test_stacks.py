"""Stacks of several kinds, vectors and options through whole runs: grown, frozen, saved, resumed to the bit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from protomamba import SequenceModel
from protomamba.bits import same
from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main
from protomamba.train.run_header import stack

STACK = ["--layers", "mamba*2,attention", "--layer-option", "attention.n_head=2", "--layer-option", "d_state=4"]
GROWTH = ["--base-layers", "2", "--target-layers", "4", "--placement", "specific:1,3", "--freeze", "first:1"]


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    path = tmp_path / "tokens.txt"
    drawn = torch.randint(13, (900,), generator=torch.Generator().manual_seed(5))
    path.write_text(" ".join(map(str, drawn.tolist())))
    return path


def train(out: Path, tokens: Path, *more: str) -> int:
    sizes = ["--d-model", "8", "--seq-len", "16", "--batch-size", "2", "--save-every", "3", "--val-every", "3"]
    cadence = ["--bp-cadence-steps", "2", "--eos-token", "3", "--reset-at-eos", "1", "--threads", "1"]
    return main(["train", "--token-file", str(tokens), "--out-dir", str(out), *sizes, *cadence, *more])


def test_a_stack_is_grown_by_final_places_and_resumes_to_the_bit(tmp_path: Path, tokens: Path) -> None:
    more = [*STACK, *GROWTH, "--dropout", "0.1"]
    assert train(tmp_path / "whole", tokens, "--steps", "6", "--keep-last", "3", *more) == 0
    whole = checkpoint.load(tmp_path / "whole" / "latest.safetensors")
    model = SequenceModel.from_pretrained(tmp_path / "whole")
    kinds = [type(block.mixer).__name__ for block in model.blocks()]
    assert kinds == ["Mamba", "Mamba", "Attention", "Mamba"]
    assert model.config.layer_options["attention"]["n_head"] == 2 and model.config.d_state == 4
    middle = tmp_path / "whole" / "step-00000003.safetensors"
    assert main(["train", "--resume", str(middle), "--out-dir", str(tmp_path / "again"), "--threads", "1"]) == 0
    again = checkpoint.load(tmp_path / "again" / "latest.safetensors")
    for part in ("model", "optimizer", "rng"):
        assert same(again.parts[part], whole.parts[part]), part


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        ([], "0 layers (none)"),
        (["mamba"], "1 layer (mamba)"),
        (["mamba"] * 6, "6 layers (mamba)"),
        (["mamba"] * 3 + ["attention"], "4 layers (mamba*3, attention)"),
        ((["mamba"] * 3 + ["attention"]) * 2, "8 layers (mamba*3, attention, repeated)"),
        (["mamba", "attention", "mamba"], "3 layers (mamba, attention, repeated)"),
    ],
)
def test_the_header_says_what_the_stack_is(kinds: list[str], says: str) -> None:
    assert stack(kinds) == says


def test_the_same_line_resumes_and_another_stack_does_not(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["--steps", "3", "--resume", "auto", *STACK, *GROWTH]
    assert train(tmp_path / "run", tokens, *line) == 0
    assert train(tmp_path / "run", tokens, *line) == 0
    assert train(tmp_path / "run", tokens, *line, "--layers", "mamba") == 2
    assert "--layers: the checkpoint has mamba*2,attention, given mamba" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--layer", "mamba", "--layers", "compact"], "--layer mamba and --layers compact: give one of them"),
        (["--layers", "mamba,,compact"], "expected KIND[*N]"),
        (["--layers", "mamba,atention"], "did you mean attention?"),
        (["--layer-option", "d_stat=3"], "--layer-option d_stat: mamba has no such setting (did you mean d_state?)"),
        (["--layer-option", "attention.n_head=3"], "the model has no attention"),
        (["--head-option", "sample"], "expected KEY=VALUE"),
        (["--input", "vectors"], "did you mean vector?"),
        (["--dropout", "1"], "--dropout"),
    ],
)
def test_a_part_that_cannot_be_is_one_line(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str
) -> None:
    assert train(tmp_path / "run", tokens, "--steps", "1", *flags) == 2
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def test_weights_keep_their_kinds_and_settings(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "base", tokens, "--steps", "2", "--base-layers", "3", "--target-layers", "3", *STACK) == 0
    start = ["--steps", "1", "--init-from", str(tmp_path / "base"), "--freeze", "none"]
    assert train(tmp_path / "same", tokens, *start) == 0
    assert SequenceModel.from_pretrained(tmp_path / "same").config.layer_options["attention"]["n_head"] == 2
    grown = ["--target-layers", "5", "--placement", "append"]
    assert train(tmp_path / "grown", tokens, *start, *grown, "--layers", "mamba*2,attention*2,compact") == 0
    found = SequenceModel.from_pretrained(tmp_path / "grown").config
    assert found.kinds(5) == ["mamba", "mamba", "attention", "attention", "compact"]
    capsys.readouterr()
    assert train(tmp_path / "no", tokens, *start, "--layers", "mamba*3") == 2
    assert "the places they would take are for mamba,mamba,mamba" in capsys.readouterr().err
    assert train(tmp_path / "no", tokens, *start, "--layer-option", "n_head=4") == 2
    assert "--layer-option attention.n_head" in capsys.readouterr().err
