"""Trackers: what they are told, live and replayed, and that one that fails costs the run nothing."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.runs import flags, metrics, token_file, train

from protomamba.bits import same
from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main
from protomamba.metrics_file import read_metrics
from protomamba.train.callbacks import trackers
from protomamba.train.callbacks.trackers import Tracked, replay, tracked_figures

READER = Path(__file__).with_name("read_tracked.py")


class Notebook:
    """A tracker that keeps what it is told; raises in the n-th call of `log` if asked to."""

    begun: list[Tracked]
    lines: list[tuple[int, dict[str, float]]]
    texts: list[tuple[int, dict[str, str]]]
    closed: int
    fails_at: int | None

    def __init__(self, run: Tracked) -> None:
        type(self).begun.append(run)
        if self.fails_at == 0:
            raise OSError("no room\nfor anything")

    def log(self, step: int, figures: Mapping[str, float], seconds: float) -> None:
        self.lines.append((step, dict(figures)))
        if len(self.lines) == self.fails_at:
            raise RuntimeError("the service is down")

    def write(self, step: int, texts: Mapping[str, str], seconds: float) -> None:
        self.texts.append((step, dict(texts)))

    def close(self) -> None:
        type(self).closed += 1


@pytest.fixture
def notebook(monkeypatch: pytest.MonkeyPatch) -> type[Notebook]:
    made = type("Fresh", (Notebook,), {"begun": [], "lines": [], "texts": [], "closed": 0, "fails_at": None})
    monkeypatch.setitem(trackers.TRACKERS, "wandb", trackers.TrackerKind("json", made))
    return made


def expected(folder: Path) -> list[tuple[int, dict[str, float]]]:
    tracked = ("train", "validation", "ranking", "classification")
    events = (event for event in read_metrics(folder / "metrics.jsonl") if event["event"] in tracked)
    return [(event["step"], tracked_figures(event)) for event in events]


TINY = {"d-model": 8, "base-layers": 1, "target-layers": 1, "steps": 4, "batch-size": 2, "write-report": 0}


def judged_run(folder: Path, kind: str, *flags: str) -> Path:
    """A run on a prepared folder, whose best model is judged at its end."""
    tables = {
        "labels": ["label,text", *(f"{'odd' if n % 2 else 'even'},word {n}" for n in range(40))],
        "events": ["user,item", *(f"u{n // 5},i{n % 7}" for n in range(60))],
        "text": [f"line {n} of a text" for n in range(300)],
    }
    columns = {"labels": ["--label", "label", "--text", "text"], "events": ["--group", "user", "--item", "item"]}
    file = folder / ("in.txt" if kind == "text" else "in.csv")
    file.write_text("\n".join(tables[kind]) + "\n")
    sizes = [part for name, value in TINY.items() for part in (f"--{name}", str(value))]
    named = [kind, str(file), *columns[kind]] if kind in columns else [str(file)]
    assert main(["prepare", *named, "--out-dir", str(folder / "data")]) == 0
    assert main(["train", str(folder / "data"), "--out-dir", str(folder / "run"), *sizes, *flags]) == 0
    return folder / "run"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("labels", {"classification/validation/accuracy", "classification/validation/f1/odd"}),
        ("events", {"ranking/validation/hit@10", "ranking/validation/popularity/mrr"}),
        ("text", set()),
    ],
)
def test_the_judgement_of_the_best_model_is_tracked_live_and_replayed(
    tmp_path: Path, notebook: type[Notebook], kind: str, names: set[str]
) -> None:
    run = judged_run(tmp_path, kind, "--track", "wandb")
    live, texts = list(notebook.lines), list(notebook.texts)
    assert live == expected(run) and live[-1][0] == 4
    assert names <= {name for _, figures in live for name in figures}
    samples = metrics(run, "sample")
    assert len(samples) == (kind == "text")
    assert texts == [(4, {"sample": sample["prompt"] + sample["text"]}) for sample in samples]
    notebook.lines.clear(), notebook.texts.clear()
    assert main(["track", str(run), "--to", "wandb"]) == 0
    assert (notebook.lines, notebook.texts) == (live, texts)


def test_figures_of_a_confusion_matrix() -> None:
    event = {
        "event": "classification",
        "step": 4,
        "split": "test",
        "classes": ["a", "b", "c"],
        "confusion": [[3, 1, 0], [0, 0, 0], [0, 0, 0]],
    }
    figures = tracked_figures(event)
    assert figures["classification/test/accuracy"] == 0.75
    assert figures["classification/test/f1/a"] == pytest.approx(6 / 7) and figures["classification/test/f1/b"] == 0
    assert figures["classification/test/macro_f1"] == pytest.approx(3 / 7)  # of a and b: c occurs nowhere


def test_a_tracker_is_told_what_metrics_jsonl_is(tmp_path: Path, notebook: type[Notebook]) -> None:
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 8, "--log-every", 2, "--track", "wandb") == 0
    assert notebook.lines == expected(tmp_path / "run") and notebook.closed == 1
    (begun,) = notebook.begun
    assert (begun.name, begun.folder, begun.first_step) == ("run", tmp_path / "run", 0)
    assert begun.config["d_model"] == 8 and begun.config["kernels"] in ("native", "reference")
    names = set().union(*(figures for _, figures in notebook.lines))
    assert names >= {"train/loss", "train/lr", "train/tokens_per_s", "validation/val_nll"}


@pytest.mark.parametrize(("fails_at", "words"), [(0, "OSError: no room"), (3, "RuntimeError: the service is down")])
def test_one_that_raises_is_told_once_and_switched_off(
    tmp_path: Path, notebook: type[Notebook], fails_at: int, words: str
) -> None:
    tokens = token_file(tmp_path)
    notebook.fails_at = fails_at
    assert train(tmp_path / "run", tokens, "--steps", 8, "--track", "wandb") == 0
    assert len(notebook.lines) == fails_at
    (warning,) = metrics(tmp_path / "run", "warning")
    assert warning["text"].startswith(f"--track wandb is switched off: {words}; ")
    assert "protomamba track" in warning["text"] and metrics(tmp_path / "run", "end")[0]["reason"] == "done"


def test_tracking_changes_no_bit_and_a_resume_keeps_the_identity(tmp_path: Path, notebook: type[Notebook]) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "plain", tokens, "--steps", 8) == 0
    assert train(tmp_path / "run", tokens, "--steps", 8, "--track", "wandb") == 0
    models = [checkpoint.load(tmp_path / name / "latest.safetensors").parts["model"] for name in ("plain", "run")]
    assert same(*models)
    assert train(tmp_path / "run", tokens, "--resume", "auto", "--steps", 4, "--track", "wandb") == 0
    first, second = notebook.begun
    assert first.identity == second.identity and (first.first_step, second.first_step) == (0, 8)


def test_what_cannot_begin_is_told_before_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tokens = token_file(tmp_path)
    assert train(tmp_path / "run", tokens, "--track", "wndb") == 2
    assert "--track wndb: expected one of tensorboard, trackio, wandb" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert train(tmp_path / "run", tokens, "--track", "trackio") == 1
    assert "pip install 'protomamba[trackio]'" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_replay_gives_the_same_lines_by_rising_steps(tmp_path: Path, notebook: type[Notebook]) -> None:
    assert train(tmp_path / "run", token_file(tmp_path), "--steps", 8) == 0
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        ranking = {"event": "ranking", "step": 8, "split": "test", "figures": {"mrr": 0.5}}
        file.write(json.dumps(ranking) + "\n")
    assert main(["track", str(tmp_path / "run"), "--to", "wandb", "--name", "again"]) == 0
    assert notebook.lines == expected(tmp_path / "run") and notebook.lines[-1] == (8, {"ranking/test/mrr": 0.5})
    assert notebook.begun[0].name == "again" and notebook.begun[0].config["vocab_size"] == 13
    assert replay([], Notebook.__new__(notebook)) == 0
    assert main(["track", str(tmp_path), "--to", "wandb"]) == 1


def test_numbers_that_are_none_stay_away() -> None:
    event = {"event": "train", "step": 3, "loss": float("nan"), "lr": 0.5, "grad_norm": None, "clipped": True}
    assert tracked_figures(event) == {"train/lr": 0.5}


def in_a_process(*command: str, folder: Path) -> str:
    offline = {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "TRACKIO_DIR": str(folder / "trackio")}
    environment = {**os.environ, **offline, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, timeout=240)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
@pytest.mark.parametrize("how", ["live", "replayed"])
def test_the_real_library_offline(tmp_path: Path, kind: str, how: str) -> None:
    pytest.importorskip(kind)
    run, tokens = tmp_path / "run", token_file(tmp_path)
    live = ["--track", kind] if how == "live" else []
    in_a_process("-m", "protomamba", *flags(run, tokens, "--steps", 8, *live), folder=tmp_path)
    assert metrics(run, "warning") == []
    if how == "live":
        more = flags(run, tokens, "--resume", "auto", "--steps", 4, *live)
        in_a_process("-m", "protomamba", *more, folder=tmp_path)
    else:
        in_a_process("-m", "protomamba", "track", str(run), "--to", kind, folder=tmp_path)
    found = json.loads(in_a_process(str(READER), kind, str(run), folder=tmp_path).splitlines()[-1])
    wanted: dict[str, dict[str, float]] = {}
    for step, figures in expected(run):
        for name, value in figures.items():
            wanted.setdefault(name, {})[str(step)] = value
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=1e-6), name


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tensorboard", "trackio", "wandb"])
@pytest.mark.parametrize("data", ["labels", "text"])
def test_the_real_library_keeps_the_judgement(tmp_path: Path, kind: str, data: str) -> None:
    pytest.importorskip(kind)
    run = judged_run(tmp_path, data)
    in_a_process("-m", "protomamba", "track", str(run), "--to", kind, folder=tmp_path)
    found = json.loads(in_a_process(str(READER), kind, str(run), folder=tmp_path).splitlines()[-1])
    for step, figures in expected(run):
        for name, value in figures.items():
            assert found[name][str(step)] == pytest.approx(value, rel=1e-6)
    for sample in metrics(run, "sample"):
        kept = found["sample"]["4"]  # trackio's Markdown is an object
        kept = kept["_value"] if isinstance(kept, dict) else kept
        assert all(line.strip() in kept for line in (sample["prompt"] + sample["text"]).splitlines())
