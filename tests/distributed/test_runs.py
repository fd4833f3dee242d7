"""Whole runs under torch's launcher: the same checkpoints and metrics on any number of ranks, and what stops them."""

from __future__ import annotations

import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import runs
from tests.distributed.launch import LIMIT_S, torchrun

SHARDS = 4
FLAGS = ["--batch-size", 5, "--grad-shards", SHARDS, "--grad-clip-norm", 0.05, "--ff-lr", 1e-2, "--steps", 8]


def arguments(out_dir: Path, tokens: Path, *more: object) -> list[str]:
    return ["-m", "protomamba", *runs.flags(out_dir, tokens, *FLAGS, *more)]


def finished(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and all output; the whole process tree is killed if it does not end."""
    try:
        out, errors = process.communicate(timeout=LIMIT_S)
    finally:
        process.kill()
    return process.returncode, out + errors


def train(world: int, out_dir: Path, tokens: Path, *more: object, flags: tuple[str, ...] = ()) -> str:
    """A run under the launcher, which must succeed; what it said."""
    code, output = finished(torchrun(world, arguments(out_dir, tokens, *more), *flags))
    assert code == 0, output
    return output


def numbers(out_dir: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without what a clock or a place decides."""
    kept = [line for line in runs.metrics(out_dir) if line["event"] in ("train", "validation")]
    return [{k: v for k, v in line.items() if k not in ("time", "tokens_per_s", "step_ms")} for line in kept]


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Tokens, and the run of one process."""
    folder = tmp_path_factory.mktemp("straight")
    tokens = runs.token_file(folder)
    assert runs.train(folder / "run", tokens, *FLAGS) == 0
    return tokens, folder / "run"


def same_run(out_dir: Path, straight: Path) -> None:
    runs.same_state(out_dir / "latest.safetensors", straight / "latest.safetensors")
    assert numbers(out_dir) == numbers(straight)


def test_three_ranks_leave_what_one_process_leaves(straight: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, alone = straight
    output = train(3, tmp_path / "run", tokens)
    same_run(tmp_path / "run", alone)
    assert output.count("3 for 4 gradient shards; 5 rows a batch, of all together") == 1


def test_a_run_goes_on_at_another_number_of_ranks(straight: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, alone = straight
    out_dir = tmp_path / "run"
    process = torchrun(2, arguments(out_dir, tokens, "--callback", "tests.distributed.callbacks:StopAtThree"))
    code, output = finished(process)
    assert runs.metrics(out_dir, "end")[-1]["reason"] == "stopped" and code == 0, output
    assert runs.train(out_dir, tokens, *FLAGS, "--resume", "auto") == 0
    same_run(out_dir, alone)
