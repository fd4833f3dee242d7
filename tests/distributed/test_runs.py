"""Whole runs under torch's launcher: the same checkpoints and metrics on any number of ranks, and what stops them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from protomamba.errors import ConfigError
from protomamba.run_config import RunConfig
from protomamba.train.build import build_parts
from protomamba.train.signals import STOPPED_EXIT_CODE
from tests import runs
from tests.distributed.launch import LIMIT_S, torchrun
from tests.distributed.layers import LAYER
from tests.marks import slow

SHARDS = 4
FLAGS = ["--batch-size", 5, "--grad-shards", SHARDS, "--grad-clip-norm", 0.05, "--steps", 8, "--save-every", 2]
FLAGS += ["--layer", LAYER, "--grad-accum", 2]


def arguments(out_dir: Path, tokens: Path, *more: object) -> list[str]:
    return ["-m", "protomamba", *runs.flags(out_dir, tokens, *FLAGS, *more)]


def finished(process: subprocess.Popen[str], limit_s: float = LIMIT_S) -> tuple[int, str]:
    """Exit code and all output; the launcher and all it started are killed if it does not end."""
    try:
        out, errors = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return process.returncode, out + errors


def train(world: int, out_dir: Path, tokens: Path, *flags: str, **variables: str) -> str:
    """A run under the launcher, which must succeed; what it said."""
    code, output = finished(torchrun(world, arguments(out_dir, tokens), *flags, **variables))
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
    assert output.count("3 for 4 gradient shards; 5 rows per batch in total") == 1


@pytest.mark.slow
def test_workers_that_meet_now_and_then_leave_the_same_on_any_number_of_ranks(tmp_path: Path) -> None:
    tokens, more = runs.token_file(tmp_path), ("--sync-every", 3, "--workers-outer", 2)
    assert runs.train(tmp_path / "alone", tokens, *FLAGS, *more) == 0
    code, output = finished(
        torchrun(3, arguments(tmp_path / "run", tokens, *more), "--max-restarts", "1", FAULT="kill:1:13")
    )
    assert code == 0, output
    same_run(tmp_path / "run", tmp_path / "alone")


@pytest.mark.slow
def test_a_run_goes_on_at_another_number_of_ranks(straight: tuple[Path, Path], tmp_path: Path) -> None:
    tokens, alone = straight
    out_dir = tmp_path / "run"
    process = torchrun(2, arguments(out_dir, tokens, "--callback", "tests.distributed.callbacks:StopAtThree"))
    code, output = finished(process)
    assert runs.metrics(out_dir, "end")[-1]["reason"] == "stopped" and code == 0, output
    assert runs.train(out_dir, tokens, *FLAGS, "--resume", "auto") == 0
    same_run(out_dir, alone)


@pytest.mark.parametrize(
    "fault",
    ["kill:1:13", slow("memory:0:21"), slow("term:1:13"), slow("stop:1:9")],
)
def test_a_failed_rank_costs_nothing_where_the_launcher_may_restart(
    fault: str, straight: tuple[Path, Path], tmp_path: Path
) -> None:
    tokens, alone = straight
    train(2, tmp_path / "run", tokens, "--max-restarts", "1", FAULT=fault)
    same_run(tmp_path / "run", alone)
    assert [line.get("resumed_from") is not None for line in runs.metrics(tmp_path / "run", "run")] == [False, True]


@pytest.mark.slow
def test_kills_of_random_ranks_lose_nothing(tmp_path: Path) -> None:
    kills = int(os.environ.get("KILLS", "5"))
    # A start that is killed takes three steps at most: all kills come before the end.
    more = ("--steps", 3 * kills + 1, "--save-every", 1, "--val-every", 5)
    tokens = runs.token_file(tmp_path)
    assert runs.train(tmp_path / "straight", tokens, *FLAGS, *more) == 0
    process = torchrun(
        3, arguments(tmp_path / "run", tokens, *more), "--max-restarts", str(kills), FAULT=f"kills:1:{kills}"
    )
    code, output = finished(process, 60.0 + 60.0 * kills)
    assert code == 0, output
    assert len(runs.metrics(tmp_path / "run", "run")) == kills + 1
    same_run(tmp_path / "run", tmp_path / "straight")


@pytest.mark.slow
def test_a_restart_goes_on_from_the_newest_where_the_checkpoint_named_is_pruned(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    tokens, out_dir, alone = straight[0], tmp_path / "run", tmp_path / "alone"
    assert runs.train(out_dir, tokens, *FLAGS, "--callback", "tests.distributed.callbacks:StopAtThree") == 0
    shutil.copytree(out_dir, alone)
    assert runs.train(alone, tokens, *FLAGS, "--resume", alone / "step-00000002.safetensors") == 0
    given = ("--resume", out_dir / "step-00000002.safetensors")
    code, output = finished(torchrun(2, arguments(out_dir, tokens, *given), "--max-restarts", "1", FAULT="kill:1:19"))
    assert code == 0, output
    assert [Path(line["resumed_from"] or "").name for line in runs.metrics(out_dir, "run")] == [
        "",
        "step-00000002.safetensors",
        "latest.safetensors",
    ]
    runs.same_state(out_dir / "latest.safetensors", alone / "latest.safetensors")


def test_without_restarts_all_ranks_say_why_and_end(straight: tuple[Path, Path], tmp_path: Path) -> None:
    code, output = finished(torchrun(2, arguments(tmp_path / "run", straight[0]), FAULT="raise:1:5"))
    assert code == 1
    assert "protomamba: Faulty: the test's own error" in output
    assert runs.metrics(tmp_path / "run", "end")[-1]["error"] == "rank 1: Faulty: the test's own error"


@pytest.mark.slow
def test_a_signal_to_the_launcher_ends_all_after_a_step_with_a_checkpoint(
    straight: tuple[Path, Path], tmp_path: Path
) -> None:
    tokens, alone = straight
    out_dir = tmp_path / "run"
    process = torchrun(2, arguments(out_dir, tokens, "--callback", "tests.distributed.callbacks:SignalTheLauncher"))
    code, output = finished(process)
    assert code == 1, output
    assert output.count(f"exitcode  : {STOPPED_EXIT_CODE}") >= 1 or "SIGTERM" in output
    end = runs.metrics(out_dir, "end")[-1]
    assert end["reason"] == "signal" and 3 <= end["step"] < 8
    assert runs.train(out_dir, tokens, *FLAGS, "--resume", "auto") == 0
    same_run(out_dir, alone)


@pytest.mark.slow
def test_ranks_that_differ_are_refused_by_name(straight: tuple[Path, Path], tmp_path: Path) -> None:
    script = tmp_path / "differ.py"
    script.write_text(
        "import os, sys, torch\n"
        "torch.set_num_threads(1 + int(os.environ['RANK']))\n"
        "from protomamba.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    given = arguments(tmp_path / "run", straight[0], "--threads", "auto")[2:]
    code, output = finished(torchrun(2, [str(script), *given]))
    assert code == 1 and "threads: rank 1 has 2, rank 0 has 1" in output
    code, output = finished(torchrun(2, [str(script), *given, "--allow-mixed-ranks", "1"]))
    assert code == 0 and "note: --allow-mixed-ranks 1: threads: rank 1 has 2, rank 0 has 1" in output


def test_more_shards_than_rows_are_refused_at_the_start(straight: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"6 gradient shards of a batch of 5 rows"):
        build_parts(RunConfig(token_file=straight[0], batch_size=5, grad_shards=6, out_dir=tmp_path))
