"""`generate`: one prompt is answered as the tokens come, several when all have ended; stop strings end any of them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from protomamba.cli import generate as command
from protomamba.cli.main import main
from tests.predict.models import saved


@pytest.fixture(scope="module")
def speaker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte model whose likeliest next byte is the one behind the last: abcdef..., whatever came before."""
    from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
    from protomamba.checkpoint import file as checkpoint
    from protomamba.data.tokenizer import ByteTokenizer

    sizes = {"vocab_size": 257, "d_model": 257, "d_state": 4, "n_layer": 1, "head": "softmax"}
    model = SequenceModel(ModelConfig(**sizes), seed=0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "mixer" in name and "out_proj" in name:
                parameter.zero_()  # the block adds nothing: z is the token's own row
        model.embedding.weight.copy_(torch.eye(257))
        model.head.weight.copy_(torch.eye(257).roll(1, 0))
    path = tmp_path_factory.mktemp("speaker") / "latest.safetensors"
    trainer = Trainer(model, TrainConfig())
    checkpoint.save(path, trainer.parts(), config={**trainer.configs(), "tokenizer": ByteTokenizer().to_json()})
    return path


def run(speaker: Path, *flags: str) -> int:
    return main(["generate", str(speaker), "--temperature", "0", "--threads", "1", *flags])


def test_one_prompt_is_answered_token_by_token(
    speaker: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flushes: list[str] = []
    printed = command.Writer._print

    def watched(self: command.Writer, text: str) -> None:
        printed(self, text)
        flushes.append(capsys.readouterr().out)  # what a reader of the pipe has by now

    monkeypatch.setattr(command.Writer, "_print", watched)
    assert run(speaker, "--prompt", "ab", "--max-tokens", "4") == 0
    assert [text for text in flushes if text] == ["ab", "c", "d", "e", "f", "\n"]


@pytest.mark.parametrize(("stop", "shown"), [("de", "abc"), ("c", "ab"), ("zz", "abcdefgh")])
def test_a_stop_string_ends_the_text_and_is_not_printed(
    speaker: Path, stop: str, shown: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(speaker, "--prompt", "ab", "--max-tokens", "6", "--stop", stop) == 0
    assert capsys.readouterr().out == shown + "\n"


def test_several_stop_strings_and_prompts_and_json(
    speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "p.txt").write_text("ab\nst\n")
    flags = ["--prompt-file", str(tmp_path / "p.txt"), "--max-tokens", "6", "--stop", "ef", "--stop", "w"]
    assert run(speaker, *flags) == 0
    assert capsys.readouterr().out == "abcd\nstuv\n"
    assert run(speaker, *flags, "--json") == 0
    found: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["outputs"]
    assert [(each["text"], each["tokens"], each["stop"]) for each in found] == [
        ("cd", list(b"cd"), "ef"),
        ("uv", list(b"uv"), "w"),
    ]


def test_what_stop_cannot_do(speaker: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(speaker, "--prompt", "a", "--stop", "") == 2
    assert "--stop ''" in capsys.readouterr().err
    assert main(["generate", str(saved(tmp_path)), "--stop", "x"]) == 2
    assert "no tokenizer" in capsys.readouterr().err


def test_a_reader_that_left_ends_the_work(speaker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", _Broken())
    assert run(speaker, "--prompt", "a", "--max-tokens", "1000000000") == 0


class _Broken:
    encoding = "utf-8"

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def fileno(self) -> int:
        raise OSError
