"""Training on labelled sequences through the real command: it learns, resumes to the bit, and says what it is not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from tests.runs import TINY, losses, metrics, same_state

from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main

CLASSES = 3


def write_task(folder: Path, count: int = 120, name: str = "") -> list[str]:
    """Sequences of two to six tokens whose class is that of the commonest token family; the flags that read them."""
    folder.mkdir(exist_ok=True)
    tokens, labels = folder / f"{name}tokens.txt", folder / f"{name}labels.txt"
    rows = [[3 * (i * j % 2) + i % CLASSES for j in range(2 + i % 5)] for i in range(count)]
    tokens.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    labels.write_text("".join(f"{i % CLASSES}\n" for i in range(count)))
    return [f"--{name}token-file", str(tokens), f"--{name}label-file", str(labels)]


def train(out: Path, *more: object) -> int:
    return main(["train", *TINY, "--batch-size", "8", "--out-dir", str(out), *map(str, more)])


def test_it_learns_and_eval_counts_labels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = write_task(tmp_path)
    assert train(tmp_path / "run", *task, "--steps", 80, "--val-ratio", 0.2, "--val-every", 40) == 0
    shown = capsys.readouterr().out
    assert "96 labelled sequences of 2 to 6 tokens" in shown and "24 of the 120 sequences" in shown
    assert f"over {CLASSES} classes" in shown
    last = metrics(tmp_path / "run", "validation")[-1]
    assert last["val_accuracy"] > 0.9 and last["majority_accuracy"] < 0.7 and last["targets"] <= 24
    path = str(tmp_path / "run" / "best.safetensors")
    model = checkpoint.load(Path(path)).config["model"]
    assert (model["vocab_size"], model["n_class"]) == (6, CLASSES)
    assert main(["eval", path, "--json"]) == 0
    held_out = json.loads(capsys.readouterr().out)
    assert held_out["targets"] == 24 and held_out["accuracy"] > 0.9
    assert main(["eval", path, *write_task(tmp_path / "other", 30), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["targets"] == 30


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_run_goes_on_to_the_bit(tmp_path: Path, workers: int) -> None:
    task = [*write_task(tmp_path, 30), *write_task(tmp_path, 12, "val-"), "--prefetch-workers", workers]
    assert train(tmp_path / "whole", *task, "--steps", 12) == 0
    assert train(tmp_path / "cut", *task, "--steps", 12, "--keep-last", 9) == 0
    start = tmp_path / "cut" / "step-00000004.safetensors"
    assert main(["train", "--resume", str(start), "--out-dir", str(tmp_path / "cut")]) == 0
    same_state(tmp_path / "whole" / "latest.safetensors", tmp_path / "cut" / "latest.safetensors")
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


def test_a_checkpoint_of_a_language_model_starts_a_classifier_with_a_fresh_head(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path)
    assert train(tmp_path / "tokens", *task[:2], "--steps", 2) == 0
    base = tmp_path / "tokens" / "latest.safetensors"
    assert train(tmp_path / "classes", *task, "--init-from", base, "--steps", 2) == 0
    assert "head is left out" in capsys.readouterr().out


def test_generate_and_eval_refuse_what_a_classifier_cannot_do(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    task = write_task(tmp_path)
    assert train(tmp_path / "run", *task, "--steps", 1, "--n-class", 6) == 0  # as many classes as tokens
    path = str(tmp_path / "run" / "latest.safetensors")
    capsys.readouterr()
    assert main(["generate", path]) == 1
    assert "is a 6-class model, so it has no next token" in capsys.readouterr().err
    assert main(["eval", path, *task[:2]]) == 2
    assert "give the labels with --label-file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("keep", "more", "code", "says"),
    [
        (slice(2, 4), [], 2, "--token-file and --label-file together"),
        (slice(0, 2), ["--n-class", "3"], 2, "--token-file and --label-file together"),
        (slice(0, 4), ["--val-token-file", "x.txt"], 2, "--val-token-file and --val-label-file go together"),
        (slice(0, 4), ["--val-token-dir", "x"], 2, "leave out"),
        (slice(0, 4), ["--reset-at-eos", "1", "--eos-token", "1"], 2, "leave out"),
        (slice(0, 4), ["--n-class", "2"], 1, "labels.txt, line 3: expected labels below the number of classes 2"),
        (slice(0, 4), ["--vocab-size", "3"], 1, "tokens.txt, line 2: expected tokens below the vocabulary size 3"),
        (slice(0, 4), ["--seq-len", "4"], 1, "tokens.txt, line 4: expected at most --seq-len 4 tokens, found 5"),
        (slice(0, 4), ["--val-ratio", "0.001"], 1, "too few to hold out 0.001"),
    ],
)
def test_flags_and_files_that_do_not_fit_are_one_line(
    keep: slice, more: list[str], code: int, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train(tmp_path / "run", *write_task(tmp_path)[keep], *more) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1 and error.startswith("protomamba: ")


def test_moments_of_its_head_do_not_follow_into_one_of_other_classes(tmp_path: Path) -> None:
    assert train(tmp_path / "labels", *write_task(tmp_path), "--steps", 4, "--val-ratio", 0.2) == 0
    text = tmp_path / "plain.txt"
    start = ["--init-from", tmp_path / "labels" / "latest.safetensors"]
    text.write_text(" ".join(str(i % 6) for i in range(400)))
    grow = ["--target-layers", 2, "--placement", "append", "--steps", 2]
    assert train(tmp_path / "tokens", "--token-file", text, *start, *grow) == 0
    moments = checkpoint.load(tmp_path / "tokens" / "latest.safetensors").parts["optimizer"]["moments"]
    assert moments["head.prototypes"]["step"] == 2 and moments["embedding.weight"]["step"] == 6


def test_an_end_of_document_that_labels_do_not_need_still_resumes(tmp_path: Path) -> None:
    more = [*write_task(tmp_path), "--eos-token", 5, "--val-ratio", 0.2]
    assert train(tmp_path / "run", *more, "--steps", 4) == 0
    assert train(tmp_path / "run", *more, "--resume", "auto") == 0


def test_series_of_real_values_train_from_their_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two classes told apart by the sign of one of two channels; one value in ten is missing."""
    rows = ["id,t,kind,a,b"]
    for i in range(60):
        rows += [
            f"{i},{t},{'up' if i % 2 else 'down'},{'' if (i + t) % 10 == 0 else (1 if i % 2 else -1) + t / 9},{t}"
            for t in range(3 + i % 4)
        ]
    (tmp_path / "a.csv").write_text("\n".join(rows) + "\n")
    columns = ["--label", "kind", "--values", "a,b", "--group", "id", "--order", "t"]
    assert main(["prepare", "labels", str(tmp_path / "a.csv"), *columns, "--out-dir", str(tmp_path / "data")]) == 0
    run = ["train", str(tmp_path / "data"), "--out-dir", str(tmp_path / "run"), "--d-model", "16", "--steps", "60"]
    assert main([*run, "--val-ratio", "0.2"]) == 0
    shown = capsys.readouterr().out
    assert "classes     2: down, up" in shown and f"protomamba train {tmp_path / 'data'}" in shown
    assert "values are missing; the model sees which" in shown and "of 3 to 6 steps" in shown
    assert float(re.findall(r"val_accuracy (\S+)", shown)[-1]) > 0.9
