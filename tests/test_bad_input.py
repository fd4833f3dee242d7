"""Bad data, through the real command: one line that names file, place, found and expected; never wrapped or skipped."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protomamba import ModelConfig, SequenceModel, Trainer
from protomamba.cli.main import main
from tests.runs import TINY, flags, token_file

Maker = Callable[[Path], Path]


def _text(content: str | bytes) -> Maker:
    def make(folder: Path) -> Path:
        path = folder / "bad.txt"
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    return make


def _file(name: str, data: bytes) -> Maker:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(data)
        return folder / name

    return make


def _npy(tokens: object, cut: int = 0) -> Maker:
    def make(folder: Path) -> Path:
        np.save(folder / "bad.npy", np.asarray(tokens))
        data = (folder / "bad.npy").read_bytes()
        (folder / "bad.npy").write_bytes(data[: len(data) - cut])
        return folder / "bad.npy"

    return make


GOOD = "1 2 3 4 5 6 7 8 9 " * 40
CASES: dict[str, tuple[Maker, str]] = {
    "a word": (_text("1 2 three 4 " + GOOD), r"bad\.txt.*line 1.*three"),
    "a word on line 3": (_text("1 2\n3 4\n5 x6 7\n" + GOOD), r"bad\.txt.*line 3.*x6"),
    "a float": (_text("1 2 3.5 " + GOOD), r"bad\.txt.*3\.5"),
    "a negative number": (_text("1 -2 3 " + GOOD), r"bad\.txt.*-2"),
    "a huge number": (_text("1 99999999999999999999 3 " + GOOD), r"bad\.txt.*9999"),
    "an empty file": (_text(""), r"bad\.txt.*"),
    "one token": (_text("7"), r"bad\.txt.*"),
    "shorter than a window": (_text("1 2 3 4 5"), r"bad\.txt|tokens"),
    "not UTF-8": (_text(b"1 2 \xff\xfe 3 " + GOOD.encode()), r"bad\.txt.*line 1"),
    "an odd .bin": (_file("bad.bin", b"\x01\x00" * 300 + b"\x01"), r"bad\.bin.*"),
    "a truncated .npy": (_npy(np.arange(300) % 7, cut=11), r"bad\.npy.*"),
    "a float .npy": (_npy(np.linspace(0, 1, 300)), r"bad\.npy.*float"),
    "a 2-d .npy": (_npy(np.zeros((30, 30), dtype=np.int32)), r"bad\.npy.*"),
    "a negative .npy": (_npy(np.array([1, -5] * 300)), r"bad\.npy.*-5|bad\.npy.*negative"),
    "a pickled .npy": (_npy(np.array([1, None] * 30, dtype=object)), r"bad\.npy.*"),
    "a .npy whose header never closes": (
        _file("bad.npy", b"\x93NUMPY\x01\x00\x76\x00" + b"{'descr': '<i4', 'shape': (((".ljust(118) + bytes(400)),
        r"bad\.npy: not a readable \.npy",
    ),
    "a missing file": (lambda folder: folder / "gone.txt", r"gone\.txt"),
    "a directory for a file": (lambda folder: folder, r"director|folder"),
    "an unknown extension": (_file("bad.csv", b"1,2,3"), r"bad\.csv.*expected"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_bad_token_file_is_one_line_and_exit_1(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make, says = CASES[name]
    code = main(
        ["train", *TINY, "--out-dir", str(tmp_path / "run"), "--token-file", str(make(tmp_path)), "--steps", "2"]
    )
    said = capsys.readouterr().err
    assert code == 1 and said.count("\n") == 1 and re.search(says, said), said
    assert not (tmp_path / "run" / "latest.safetensors").exists()


def _folder(*files: tuple[str, bytes]) -> Maker:
    def make(folder: Path) -> Path:
        shards = folder / "shards"
        shards.mkdir()
        for name, data in files:
            (shards / name).write_bytes(data)
        return shards

    return make


FOLDERS: dict[str, tuple[Maker, str]] = {
    "no shards": (_folder(("readme.md", b"hello")), r"shards.*txt"),
    "empty": (_folder(), r"shards"),
    "a bad one among good ones": (_folder(("a.txt", GOOD.encode()), ("b.txt", b"1 two 3")), r"b\.txt.*two"),
    "missing": (lambda folder: folder / "gone", r"gone"),
    "a file for a folder": (_text(GOOD), r"bad\.txt"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_a_bad_token_folder_is_one_line_and_exit_1(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, says = FOLDERS[name]
    code = main(
        ["train", *TINY, "--out-dir", str(tmp_path / "run"), "--token-dir", str(make(tmp_path)), "--steps", "2"]
    )
    said = capsys.readouterr().err
    assert code == 1 and said.count("\n") == 1 and re.search(says, said), said


def test_a_token_outside_the_vocabulary_names_file_and_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = token_file(tmp_path)
    tokens.write_text(tokens.read_text() + " 99")
    out = ["--out-dir", str(tmp_path / "run"), "--token-file", str(tokens), "--vocab-size", "13"]
    assert main(["train", *TINY, *out]) == 1
    said = capsys.readouterr().err
    assert "tokens.txt" in said and "99" in said and "600" in said, said


def test_validation_tokens_that_are_too_short_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("1 2 3")
    tokens, out = token_file(tmp_path), tmp_path / "run"
    data = ["--token-file", str(tokens), "--val-token-file", str(short), "--val-every", "200", "--save-every", "1"]
    assert main(["train", *TINY, "--out-dir", str(out), *data]) == 1
    assert "short.txt" in capsys.readouterr().err and not (out / "latest.safetensors").exists()


@pytest.mark.parametrize("command", ["eval", "generate", "inspect"])
@pytest.mark.parametrize("content", [None, b"", b"not a checkpoint", b"\x80\x04pickle", b"PK\x03\x04zip"])
def test_a_file_that_is_no_checkpoint_is_refused(
    command: str, content: bytes | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.safetensors"
    if content is not None:
        path.write_bytes(content)
    assert main([command, str(path)]) == 1
    captured = capsys.readouterr()
    assert "x.safetensors" in captured.err + captured.out
    assert main(["train", "--resume", str(path)]) == 1


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--prompt", "text"], 2, "no tokenizer"),
        (["--prompt-tokens", "1,x"], 2, "expected tokens"),
        (["--prompt-tokens", "1,99"], 2, "token 99"),
        (["--temperature", "-1"], 2, "--temperature"),
        (["--top-p", "0"], 2, "--top-p"),
        (["--max-tokens", "0"], 2, "--max-tokens"),
        (["--prompt-file", "gone.txt"], 1, "gone.txt"),
        (["--prompt-tokens", "1", "--prompt", "x"], 2, "not allowed with"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_generate_refuses_what_it_cannot_do(
    arguments: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(
        ["train", *TINY, "--out-dir", str(tmp_path / "run"), "--token-file", str(token_file(tmp_path)), "--steps", "1"]
    )
    capsys.readouterr()
    assert main(["generate", str(tmp_path / "run" / "latest.safetensors"), *arguments]) == code
    said = capsys.readouterr().err
    assert says in said and said.count("\n") == 1


def train_small(folder: Path, *more: object) -> int:
    return main(flags(folder / "run", token_file(folder), *more))


@pytest.mark.parametrize(
    ("more", "code", "says"),
    [
        (["--val-ratio", 0.005], 1, r"held out by --val-ratio 0.005: .*shorter than one window.*0 holds nothing out"),
        (["--base-layers", 1, "--freeze", "first:2"], 2, r"from 0 to 1 .*that is the default: give --freeze none"),
        (["--target-layers", 2, "--placement", "specific:1,3,4,5"], 2, r"that is the default: give --placement append"),
        (["--init-from", "nowhere"], 1, r"--init-from nowhere: there is no such checkpoint or folder"),
    ],
)
def test_an_error_names_what_the_user_can_change(
    tmp_path: Path, more: list[object], code: int, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_small(tmp_path, *more) == code
    assert re.search(says, capsys.readouterr().err)


def test_a_run_folder_is_not_a_checkpoint_but_holds_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_small(tmp_path, "--steps", 2) == 0
    run = tmp_path / "run"
    for arguments in (["eval", str(run)], ["train", "--resume", str(run)], ["inspect", str(run)]):
        assert main(arguments) == 1
        shown = capsys.readouterr()
        assert f"give {run}/latest.safetensors" in shown.err + shown.out


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("d-model = true", r"--d-model True: expected an integer >= 1"),
        ("d-model = 8\nd_model = 9", r"d-modelis given twice"),
        ('threads = "auto"\nsteps = 0', r"--steps 0: expected an integer >= 1"),
    ],
)
def test_a_config_file_is_held_to_the_same_bounds(
    tmp_path: Path, text: str, says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(text + "\n")
    assert main(["train", "--config", str(tmp_path / "run.toml"), "--out-dir", str(tmp_path / "run")]) == 2
    assert re.search(says, capsys.readouterr().err)


def test_prompts_are_named_by_flag_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train_small(tmp_path, "--steps", 2) == 0
    latest, prompts = str(tmp_path / "run" / "latest.safetensors"), tmp_path / "prompts.txt"
    for text, flags_given, code, says in (
        ("1,2\nx,3\n", ["--prompt-file", str(prompts)], 1, r"prompts.txt, line 2: expected tokens as N,N"),
        (
            "1,2\n\n3\n",
            ["--prompt-file", str(prompts)],
            1,
            r"prompts.txt: expected one prompt per line, found none in line 2",
        ),
        ("", ["--prompt-tokens", "1,x"], 2, r"--prompt-tokens: expected tokens as N,N"),
        ("", ["--prompt-tokens", "1", "--head", "softmax"], 2, r"--head softmax: the checkpoint's head is hpn"),
    ):
        prompts.write_text(text)
        assert main(["generate", latest, *flags_given]) == code
        assert re.search(says, capsys.readouterr().err)


def test_eval_of_what_a_model_was_not_made_for_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = SequenceModel(ModelConfig(vocab_size=13, d_model=8, d_state=4, n_layer=1), seed=0)
    Trainer(model).save_checkpoint(tmp_path / "alone.safetensors")
    assert main(["eval", str(tmp_path / "alone.safetensors")]) == 2
    assert "contains no run" in capsys.readouterr().err
    labels = tmp_path / "labels.txt"
    labels.write_text("0\n")
    given = ["--token-file", str(token_file(tmp_path)), "--label-file", str(labels)]
    assert main(["eval", str(tmp_path / "alone.safetensors"), *given]) == 2
    assert "predicts the next token" in capsys.readouterr().err
