"""From text to text: prepare, train on the shards, generate with the tokenizer that travelled in the checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from protomamba.cli.main import main
from tests.runs import TINY


@pytest.mark.parametrize("tokenizer", [[], ["--train-bpe", "300"]], ids=["bytes", "bpe"])
def test_text_goes_in_and_comes_out(tokenizer: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "story.txt"
    text.write_text("the cat sat on the mat; " * 200, encoding="utf-8")
    data, run = tmp_path / "data", tmp_path / "run"
    assert main(["prepare", str(text), "--out-dir", str(data), *tokenizer]) == 0
    shown = capsys.readouterr().out
    assert f"protomamba train {data} --out-dir runs/mine" in shown and "\x1b" not in shown
    more = ["--token-dir", str(data), "--shard-ext", "bin", "--steps", "150", "--seq-len", "16"]
    assert main(["train", *TINY, *more, "--d-model", "24", "--out-dir", str(run), "--log-every", "50"]) == 0
    text.unlink()
    shutil.rmtree(data)
    capsys.readouterr()
    prompt = ["--prompt", "the cat sat", "--max-tokens", "10", "--temperature", "0"]
    assert main(["generate", str(run / "latest.safetensors"), *prompt]) == 0
    assert capsys.readouterr().out.startswith("the cat sat on the")


def test_prepare_refuses_what_it_cannot_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", str(tmp_path / "gone.txt"), "--out-dir", str(tmp_path / "out")]) == 1
    assert "gone.txt" in capsys.readouterr().err
    assert main(["prepare", str(tmp_path), "--out-dir", str(tmp_path / "out"), "--jobs", "0"]) == 2
