"""The completion script, asked as the shell asks it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from protomamba.cli.main import COMMANDS, main

pytest.importorskip("shtab")

ASK = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}
_shtab_protomamba
printf '%s\\n' "${COMPREPLY[@]}"
"""


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "protomamba.bash"
    code = [sys.executable, "-m", "protomamba", "completion", "bash"]
    path.write_text(subprocess.run(code, capture_output=True, text=True, check=True).stdout)
    return path


def offered(script: Path, *words: str) -> set[str]:
    asked = subprocess.run(["bash", "-c", ASK, "ask", str(script), *words], capture_output=True, text=True, check=True)
    return set(asked.stdout.split())


def test_every_command_is_offered(script: Path) -> None:
    assert offered(script, "protomamba", "") >= {name for name in COMMANDS if " " not in name}
    assert offered(script, "protomamba", "comp") == {"compare", "completion"}


def test_flags_and_their_values_are_offered(script: Path) -> None:
    assert offered(script, "protomamba", "train", "--weight-d") == {"--weight-decay"}
    assert offered(script, "protomamba", "train", "--precision", "") == {"fp32", "bf16"}
    assert offered(script, "protomamba", "completion", "z") == {"zsh"}


def test_other_shells_have_a_script(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef protomamba")
    assert main(["completion", "fish"]) == 2
