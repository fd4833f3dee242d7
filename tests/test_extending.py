"""docs/extending.md: its code and its commands, run as they stand, with flags that make them small."""

from __future__ import annotations

import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protomamba.cli.main import run
from protomamba.errors import UserError

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()
SECTIONS = dict(part.split("\n", 1) for part in PAGE.split("\n## ")[1:])
SMALL = "--preset plain --d-model 8 --base-layers 4 --steps 4 --seq-len 16 --batch-size 2 --save-every 2 --val-every 2"
PARTS = [title for title in SECTIONS if "# mine.py\n" in SECTIONS[title]]


def code_of(title: str) -> str:
    (code,) = re.findall(r"```python\n(.*?)```", SECTIONS[title], flags=re.DOTALL)
    return str(code)


def commands_of(title: str) -> list[list[str]]:
    return [line.split()[1:] for line in SECTIONS[title].splitlines() if line.startswith("    protomamba ")]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("extending")
    (folder / "text.txt").write_text("the cat sat on the mat and the dog ran to see it\n" * 60)
    assert run(["prepare", str(folder / "text.txt"), "--out-dir", str(folder / "data")]) == 0
    return folder / "data"


@pytest.fixture
def place(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    os.symlink(data, "data")
    yield tmp_path
    sys.modules.pop("mine", None)


def test_every_part_of_the_table_has_a_section_with_code() -> None:
    assert PARTS == ["A layer", "A head", "An input", "An optimizer", "A callback"]
    assert all(commands_of(title) for title in PARTS)


@pytest.mark.parametrize("title", PARTS)
def test_the_page_s_part_trains_and_goes_on(title: str, place: Path) -> None:
    Path("mine.py").write_text(code_of(title))
    for command in commands_of(title):
        small = ["--steps", "2"] if "--resume" in command else SMALL.split() if command[0] == "train" else []
        assert run([*command, *small]) == 0
    sys.modules.pop("mine")  # as in a new process
    command = next(each for each in reversed(commands_of(title)) if each[0] == "train")
    checkpoint = f"{command[command.index('--out-dir') + 1]}/latest.safetensors"
    at = next(i for i, word in enumerate(command) if "mine:" in word)
    named = command[at - 1 : at + 1]
    if named[0] in ("--optimizer", "--callback"):
        named = []
    else:
        with pytest.raises(UserError, match=f"if you trust that code, add {re.escape(' '.join(named))}"):
            run(["eval", checkpoint])
    assert run(["eval", checkpoint, *named]) == 0
    assert run(["predict", checkpoint, "data/../text.txt", "--out", "answers.jsonl", *named]) == 0


def test_the_page_s_dataset_trains_and_goes_on(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.py").write_text(code_of("Data"))
    assert runpy.run_path("own.py")["run"].trainer.global_step == 6
    capsys.readouterr()
    runpy.run_path("own.py")
    assert "already complete; to continue: Run(..., further_steps=N)" in capsys.readouterr().out
