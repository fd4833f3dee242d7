"""An optimizer of the user's own: by name, with settings, exact over a resume, refused where only a file names it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.runs import losses, same_state, token_file, train

SGD = ["--optimizer", "examples.sgd:SGD", "--optimizer-option", "momentum=0.5", "--lr", 0.05]


def test_it_trains_and_resumes_to_the_bit(tmp_path: Path) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "straight", tokens, "--steps", 24, *SGD) == 0
    assert train(tmp_path / "cut", tokens, "--steps", 24, "--keep-last", 9, *SGD) == 0
    (tmp_path / "cut" / "step-00000012.safetensors").rename(tmp_path / "cut" / "latest.safetensors")
    for later in (tmp_path / "cut").glob("step-000000[12]*.safetensors"):
        later.unlink()
    assert train(tmp_path / "cut", tokens, "--steps", 24, "--resume", "auto", *SGD) == 0
    same_state(tmp_path / "cut" / "latest.safetensors", tmp_path / "straight" / "latest.safetensors")
    found = losses(tmp_path / "straight")
    assert found[24] < 0.8 * found[1]


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("momentun=0.5", "momentun: unknown setting (did you mean momentum?)"),
        ("momentum=2", "expected a finite number"),
        ("momentum", "expected KEY=VALUE"),
    ],
)
def test_wrong_settings_are_named(tmp_path: Path, option: str, says: str, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--optimizer", "examples.sgd:SGD", "--optimizer-option", option]
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 1, *more) == 2
    assert says in capsys.readouterr().err


def test_code_that_only_a_checkpoint_names_stays_unloaded(tmp_path: Path) -> None:
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 2, *SGD) == 0
    command = [sys.executable, "-m", "protomamba", "train", "--resume", str(tmp_path / "run" / "latest.safetensors")]
    found = subprocess.run([*command, "--steps", "1"], capture_output=True, text=True)
    assert found.returncode == 1 and "add --optimizer examples.sgd:SGD" in found.stderr
