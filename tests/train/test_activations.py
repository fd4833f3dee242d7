"""--activations bf16 through whole runs: exact over a resume, and recorded."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.runs import losses, same_state, token_file, train

NARROW = ["--activations", "bf16"]


def test_it_trains_and_resumes_to_the_bit(tmp_path: Path) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "exact", tokens, "--steps", 24) == 0
    assert train(tmp_path / "straight", tokens, "--steps", 24, "--keep-last", 9, *NARROW) == 0
    middle = tmp_path / "straight" / "step-00000012.safetensors"
    assert train(tmp_path / "cut", tokens, "--resume", middle, *NARROW) == 0
    same_state(tmp_path / "cut" / "latest.safetensors", tmp_path / "straight" / "latest.safetensors")
    exact, narrow = losses(tmp_path / "exact"), losses(tmp_path / "straight")
    assert narrow[1] == exact[1]  # the forward pass is the same
    assert narrow[24] != exact[24] and abs(narrow[24] / exact[24] - 1) < 0.01


def test_a_resume_with_another_choice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "run", tokens, "--steps", 2, *NARROW) == 0
    assert train(tmp_path / "run", tokens, "--steps", 2, "--resume", "auto", "--activations", "fp32") == 2
    assert "--activations: the checkpoint has bf16, given fp32" in capsys.readouterr().err
