"""Whole runs: they learn, stop and go on to the bit, keep what they promise in the run folder, and refuse confusion."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.marks import slow
from tests.runs import assert_equal, flags, losses, metrics, same_state, start, token_file, train

from protomamba import Trainer, Validation
from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import RunDir
from protomamba.cli.main import main


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    return token_file(tmp_path)


def test_a_run_learns_and_leaves_its_folder(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, tokens, "--steps", 40, "--keep-last", 2) == 0
    names = {path.name for path in out.iterdir()}
    assert names >= {"config.json", "latest.safetensors", "best.safetensors", "run_state.json", "metrics.jsonl"}
    assert {n for n in names if n.startswith("step-")} == {"step-00000032.safetensors", "step-00000036.safetensors"}
    validations = metrics(out, "validation")
    assert [line["step"] for line in validations] == list(range(4, 41, 4))
    assert validations[-1]["val_loss"] < 0.6 * validations[0]["val_loss"]
    assert validations[-1]["val_accuracy"] > 3 * validations[-1]["majority_accuracy"]
    lines = metrics(out)
    assert lines[0]["event"] == "run" and lines[-1]["event"] == "end" and lines[-1]["reason"] == "done"
    train_line = metrics(out, "train")[-1]
    wanted = (
        "step loss lr grad_norm tokens_per_s step_ms bp_applied ff_loss conflict_layers clipped skipped_update epoch"
    )
    assert train_line.keys() >= set(wanted.split()) | {"time"}
    assert json.loads((out / "config.json").read_text())["vocab_size"] == 13
    shown = capsys.readouterr().out
    assert "kernels" in shown and "val_accuracy" in shown and "done: step 40" in shown and "\x1b" not in shown


@pytest.mark.parametrize(
    "more",
    [
        [],
        ["--grad-accum", 3, "--prefetch-workers", 2],
        ["--bp-cadence-steps", 3, "--ff-lr", 1e-2],
        ["--target-layers", 3, "--placement", "specific:0,2", "--freeze", "first:1", "--head", "softmax"],
        ["--packed-sequences", 0, "--eos-token", 3, "--reset-at-eos", 1, "--lr-warmup-steps", 7],
        ["--layer", "examples.lstm_layer:LSTMLayer", "--head", "examples.contrastive_head:ContrastiveHead"],
    ],
    ids=lambda more: " ".join(map(str, more[:2])) or "plain",
)
def test_a_cut_run_goes_on_to_the_bit(tmp_path: Path, tokens: Path, more: list[object]) -> None:
    assert train(tmp_path / "straight", tokens, "--steps", 22, *more) == 0
    assert train(tmp_path / "cut", tokens, "--steps", 22, "--keep-last", 9, *more) == 0
    folder = tmp_path / "cut"
    # What a kill at step 14 leaves: the checkpoint of step 12, and lines that run ahead of it.
    (folder / "step-00000012.safetensors").rename(folder / "latest.safetensors")
    for later in folder.glob("step-000000[12]*.safetensors"):
        later.unlink()
    assert train(folder, tokens, "--steps", 22, "--resume", "auto", "--prefetch-workers", 1, *more) == 0
    assert losses(folder) == losses(tmp_path / "straight")
    assert [line["step"] for line in metrics(folder, "train")] == list(range(1, 23))
    same_state(folder / "latest.safetensors", tmp_path / "straight" / "latest.safetensors")


def test_resume_with_steps_lays_a_new_schedule_over_that_many(tmp_path: Path, tokens: Path) -> None:
    out = tmp_path / "run"
    train(out, tokens, "--steps", 8)
    assert main(["train", "--resume", str(out / "latest.safetensors"), "--steps", "6", "--log-every", "1"]) == 0
    rates = {line["step"]: line["lr"] for line in metrics(out, "train")}
    assert list(rates) == list(range(1, 15)) and rates[9] == 1e-2 and rates[14] == pytest.approx(1e-3)
    # Without --steps, to its own target: there is nothing left.
    assert main(["train", "--resume", str(out / "latest.safetensors")]) == 0
    assert checkpoint.load(out / "latest.safetensors").info["step"] == 14


def test_auto_starts_fresh_then_goes_on_and_a_fresh_run_does_not_bury_another(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert train(out, tokens, "--steps", 5, "--resume", "auto") == 0
    assert train(out, tokens, "--steps", 5, "--resume", "auto") == 0
    assert "already complete" in capsys.readouterr().out
    assert train(out, tokens, "--steps", 5) == 1
    assert "resume with --resume auto" in capsys.readouterr().err


def test_resuming_into_another_runs_folder_is_refused(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(tmp_path / "one", tokens, "--steps", 4)
    train(tmp_path / "other", tokens, "--steps", 8)
    into = ["--resume", str(tmp_path / "one" / "latest.safetensors"), "--out-dir", str(tmp_path / "other")]
    assert main(["train", *into, "--steps", "2"]) == 1
    assert "already contains a run" in capsys.readouterr().err
    assert checkpoint.load(tmp_path / "other" / "latest.safetensors").info["step"] == 8


def test_contradicting_flags_are_listed(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(out, tokens, "--steps", 4)
    capsys.readouterr()
    code = main(
        ["train", "--resume", str(out / "latest.safetensors"), "--d-model", "16", "--seq-len", "8", "--lr", "3"]
    )
    said = capsys.readouterr().err
    assert code == 2
    assert "--d-model: the checkpoint has 8, given 16" in said and "--lr: the checkpoint has 0.01, given 3.0" in said
    assert "--seq-len" not in said


def test_data_that_changed_is_refused_by_name(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    train(out, tokens, "--steps", 4)
    text = tokens.read_text()
    tokens.write_text("5" + text[1:])
    assert main(["train", "--resume", str(out / "latest.safetensors"), "--steps", "3"]) == 1
    assert "tokens.txt" in capsys.readouterr().err
    tokens.write_text(text)
    assert main(["train", "--resume", str(out / "latest.safetensors"), "--steps", "3"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, slow(signal.SIGINT)])
def test_a_signal_saves_and_exits_75_and_the_run_goes_on_to_the_bit(
    tmp_path: Path, tokens: Path, number: signal.Signals
) -> None:
    train(tmp_path / "straight", tokens, "--steps", 300, "--log-every", 50)
    out = tmp_path / "run"
    process = start(flags(out, tokens, "--steps", 300, "--log-every", 50))
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75, said
    at = checkpoint.load(out / "latest.safetensors").info["step"]
    assert 0 < at < 300 and metrics(out, "end")[-1]["reason"] == "signal"
    assert main(["train", "--resume", "auto", "--out-dir", str(out)]) == 0
    same_state(out / "latest.safetensors", tmp_path / "straight" / "latest.safetensors")


def test_early_stopping_counts_validations_without_improvement(tmp_path: Path, tokens: Path) -> None:
    out = tmp_path / "run"
    # A rate of practically nothing: the second validation is not better than the first.
    assert train(out, tokens, "--steps", 400, "--lr", 1e-30, "--early-stopping-patience", 2, "--ff-lr", 0) == 0
    end = metrics(out, "end")[-1]
    assert end["reason"] == "early_stopping" and end["step"] < 60


@pytest.mark.parametrize(("policy", "code"), [("continue", 0), ("stop", 1)])
def test_a_full_disk_stops_the_run_or_not_as_asked(
    tmp_path: Path, tokens: Path, policy: str, code: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from protomamba.checkpoint import folder as rundir
    from protomamba.storage import NotCommittedError

    whole = checkpoint.save

    def full(path: Path, *args: object, **kwargs: object) -> object:
        if kwargs["info"]["step"] == 8:  # type: ignore[index]
            raise NotCommittedError(f"{path}: no space left on device")
        return whole(path, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(rundir.checkpoint, "save", full)
    out = tmp_path / "run"
    assert train(out, tokens, "--steps", 12, "--on-save-error", policy) == code
    assert checkpoint.load(out / "latest.safetensors").info["step"] == (12 if code == 0 else 4)


def test_init_from_a_checkpoint_grows_from_where_it_stood(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, grown = tmp_path / "base", tmp_path / "grown"
    train(base, tokens, "--steps", 40)
    before = metrics(base, "validation")[-1]["val_loss"]
    more = ["--init-from", base / "latest.safetensors", "--target-layers", 3, "--placement", "append"]
    assert train(grown, tokens, "--steps", 40, "--freeze", "first:1", "--val-every", 1, "--lr", 1e-3, *more) == 0
    validations = metrics(grown, "validation")
    assert validations[0]["val_loss"] == pytest.approx(before, rel=0.2)
    assert validations[-1]["val_loss"] < before
    assert "keep their optimizer moments" in capsys.readouterr().out
    old, new = (checkpoint.load(p / "latest.safetensors").parts["model"] for p in (base, grown))
    frozen = {k: v for k, v in old.items() if k.startswith("layers.0.")}
    assert_equal(frozen, {k: new[k] for k in frozen}, "frozen")
    assert train(tmp_path / "wrong", tokens, "--init-from", base / "latest.safetensors", "--d-model", 16) == 2


def test_another_head_over_given_weights_starts_fresh_and_says_so(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tmp_path / "base"
    train(base, tokens, "--steps", 4, "--head", "softmax")
    assert train(tmp_path / "hpn", tokens, "--steps", 4, "--init-from", base / "latest.safetensors") == 0
    assert "softmax head is left out: the hpn head starts from scratch" in capsys.readouterr().out


def test_weights_with_two_matrices_are_not_silently_tied(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, softmax = tmp_path / "base", ["--head", "softmax"]
    train(base, tokens, "--steps", 4, *softmax)
    more = ["--init-from", base / "latest.safetensors", *softmax, "--tie-embedding", 1]
    assert train(tmp_path / "tied", tokens, "--steps", 4, *more) == 2
    assert "a head of its own" in capsys.readouterr().err


def test_learned_prototypes_can_be_fixed_from_where_they_are(tmp_path: Path, tokens: Path) -> None:
    base, fixed = tmp_path / "base", tmp_path / "fixed"
    train(base, tokens, "--steps", 8)
    assert train(fixed, tokens, "--steps", 4, "--init-from", base / "latest.safetensors", "--prototypes", "fixed") == 0
    old, new = (checkpoint.load(p / "latest.safetensors").parts["model"] for p in (base, fixed))
    assert torch.equal(old["head.prototypes"], new["head.prototypes"])


def test_eval_generate_and_inspect_on_the_result(
    tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(out, tokens, "--steps", 60)
    best = str(out / "best.safetensors")
    capsys.readouterr()
    assert main(["eval", best, "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["accuracy"] > 0.8 > figures["majority_accuracy"] and figures["perplexity"] < 4
    assert main(["eval", best, "--token-file", str(tokens), "--batches", "1"]) == 0
    assert "accuracy" in capsys.readouterr().out
    assert main(["generate", best, "--prompt-tokens", "1,2,3", "--max-tokens", "4", "--temperature", "0"]) == 0
    assert capsys.readouterr().out.strip() == "1,2,3,4,5,6,7"
    assert main(["inspect", best]) == 0
    assert "embedding.weight" in capsys.readouterr().out
    assert main(["inspect", best, "--verify"]) == 0
    data = bytearray(Path(best).read_bytes())
    data[-3] ^= 1
    Path(best).write_bytes(data)
    assert main(["inspect", best, "--verify"]) == 1


def test_threads_and_seed_reach_torch(tmp_path: Path, tokens: Path) -> None:
    train(tmp_path / "a", tokens, "--steps", 3, "--seed", 1)
    train(tmp_path / "b", tokens, "--steps", 3, "--seed", 2)
    assert torch.get_num_threads() == 1
    assert losses(tmp_path / "a") != losses(tmp_path / "b")


def test_a_prepared_folder_names_its_documents_end(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for name in "abc":
        (text / f"{name}.txt").write_text(f"document {name}, " * 40)
    assert main(["prepare", str(text), "--out-dir", str(tmp_path / "data")]) == 0
    common = ["train", "--token-dir", str(tmp_path / "data"), "--shard-ext", "bin", "--d-model", "8", "--seq-len", "16"]
    small = [
        "--base-layers",
        "1",
        "--target-layers",
        "1",
        "--freeze",
        "none",
        "--bp-cadence-steps",
        "1",
        "--steps",
        "2",
    ]
    assert main([*common, *small, "--reset-at-eos", "1", "--out-dir", str(tmp_path / "run")]) == 0
    assert json.loads((tmp_path / "run" / "config.json").read_text())["eos_token"] == 256
    assert main(["eval", str(tmp_path / "run" / "latest.safetensors")]) == 0


def test_a_run_that_stopped_early_stays_stopped(tmp_path: Path, tokens: Path) -> None:
    out = tmp_path / "run"
    more = ["--lr", 1e-30, "--early-stopping-patience", 2, "--ff-lr", 0, "--resume", "auto"]
    assert train(out, tokens, "--steps", 400, *more) == 0
    ended = metrics(out, "end")[-1]["step"]
    assert main(flags(out, tokens, *more)) == 0
    again = metrics(out, "end")[-1]
    assert (again["step"], again["reason"]) == (ended, "early_stopping")
    assert main(flags(out, tokens, *more, "--steps", 4)) == 0
    assert metrics(out, "end")[-1]["step"] > ended


def test_a_validation_that_is_not_finite_is_never_the_best(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, seen = Trainer.evaluate, []

    def first_is_nan(trainer: Trainer, *args: Any, **kwargs: Any) -> Validation:
        found = whole(trainer, *args, **kwargs)
        seen.append(found)
        return replace(found, loss=float("nan")) if len(seen) == 1 else found

    monkeypatch.setattr(Trainer, "evaluate", first_is_nan)
    assert train(tmp_path / "run", tokens, "--steps", 8) == 0
    assert [line["best"] for line in metrics(tmp_path / "run", "validation")] == [False, True]


def test_moments_do_not_follow_into_another_head(tmp_path: Path, tokens: Path) -> None:
    assert train(tmp_path / "hpn", tokens, "--steps", 4) == 0
    more = ["--init-from", tmp_path / "hpn" / "latest.safetensors", "--target-layers", 2, "--placement", "append"]
    assert train(tmp_path / "softmax", tokens, "--steps", 1, "--head", "softmax", *more) == 0
    moments = checkpoint.load(tmp_path / "softmax" / "latest.safetensors").parts["optimizer"]["moments"]
    assert moments["head.weight"]["step"] == 1 and moments["embedding.weight"]["step"] == 5


def test_the_space_asked_for_is_what_the_checkpoints_take(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    monkeypatch.setattr(RunDir, "require_space", lambda folder, size: asked.append(size))
    assert train(tmp_path / "run", tokens, "--steps", 4, "--d-model", 64) == 0
    assert (tmp_path / "run" / "latest.safetensors").stat().st_size == pytest.approx(asked[0], rel=0.05)


def test_going_back_says_what_it_abandons(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train(out, tokens, "--steps", 12, "--keep-last", 3) == 0
    assert main(["train", "--resume", str(out / "step-00000004.safetensors"), "--steps", "2"]) == 0
    assert "steps 5 to 12" in capsys.readouterr().out and (out / "metrics.superseded.jsonl").is_file()


def test_a_run_that_fails_says_so_in_its_metrics(tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from protomamba.train import trainer as loop

    monkeypatch.setattr(loop, "total_norm", lambda gradients: float("nan"))
    assert train(tmp_path / "run", tokens, "--steps", 40, "--log-every", 40) == 1
    lines = metrics(tmp_path / "run")
    assert lines[-1]["event"] == "end" and lines[-1]["reason"] == "failed" and "--lr" in lines[-1]["error"]
    assert sum(line.get("skipped_update", False) for line in lines) == loop.MAX_SKIPPED_IN_A_ROW - 1


def test_a_layer_in_the_current_folder_is_found_by_name(
    tmp_path: Path, tokens: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "my_own_layer.py").write_text("from protomamba.model.mixers.mamba import Mamba as Mine\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    assert train(tmp_path / "run", tokens, "--steps", 1, "--layer", "my_own_layer:Mine") == 0


def test_flags_that_change_nothing_are_told(tmp_path: Path, tokens: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ["--head", "softmax", "--separation", 3, "--layer", "compact", "--expand", 3]
    assert train(tmp_path / "run", tokens, "--steps", 1, *more) == 0
    shown = capsys.readouterr().out
    assert "--separation has no effect" in shown and "--expand has no effect" in shown
    assert "--prototypes" not in shown


def test_further_steps_are_told_to_begin_the_schedule_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--resume auto --steps N` began warm-up and decay again without a line."""
    run, tokens = tmp_path / "run", token_file(tmp_path)
    assert train(run, tokens, "--steps", 4) == 0
    assert train(run, tokens, "--resume", "auto", "--steps", 4) == 0  # the same command line once more
    assert "restart" not in capsys.readouterr().out
    assert train(run, tokens, "--resume", "auto", "--steps", 3) == 0
    assert "warm-up and decay restart over these 3 further steps; leave out --steps" in capsys.readouterr().out
