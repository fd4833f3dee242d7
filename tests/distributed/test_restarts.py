"""Where a run goes on from that torch's launcher has started again, whatever its flags said at first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from protomamba.errors import UserError
from protomamba.run_config import RunConfig
from protomamba.train.build import build_run
from protomamba.train.callbacks.base import Callback
from protomamba.train.callbacks.console import Console
from protomamba.train.comm import Comm
from protomamba.train.comm_start import find_together
from protomamba.train.run import Run
from protomamba.train.signals import StopRequest
from protomamba.train.trainer import StepStats
from tests import runs
from tests.distributed.threads import Mail, ThreadMesh, ranks


class Fault(Exception):
    """The end of a rank."""


class FailAt(Callback):
    """Ends the run at a step as a failure would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step(self, run: Run, stats: StepStats) -> None:
        if stats.step == self.step:
            raise Fault


def config(out_dir: Path, tokens: Path, **more: Any) -> RunConfig:
    small = {"d_model": 8, "d_state": 4, "base_layers": 1, "batch_size": 2, "seq_len": 8, "steps": 6, "threads": 1}
    cadence = {"save_every": 2, "val_every": 6, "eval_batches": 1, "keep_last": 9}
    values = {
        **small,
        **cadence,
        "preset": "plain",
        "token_file": tokens,
        "out_dir": out_dir,
        "progress": False,
        **more,
    }
    return RunConfig(**values)


def start(
    given: RunConfig, monkeypatch: pytest.MonkeyPatch, restarts: int = 0, fails_at: int = 0, launch: str = "l"
) -> Run:
    """One rank of a launch, alone; as far as it gets."""
    for name, value in (("RANK", 0), ("WORLD_SIZE", 1), ("TORCHELASTIC_RESTART_COUNT", restarts)):
        monkeypatch.setenv(name, str(value))
    mesh = ThreadMesh(0, 1, Mail(), torch.distributed.HashStore())
    mesh.launch = launch
    comm = Comm(mesh)
    resumed = find_together(given, comm)
    with Console(progress=False) as shown:
        settled = resumed.config if resumed else given
        run = build_run(settled, resumed, StopRequest(), shown, [FailAt(fails_at)], comm)
        try:
            run.fit()
        except Fault:
            assert fails_at
    return run


@pytest.fixture
def earlier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Tokens, and a run of another launch that is complete, with all its checkpoints."""
    tokens = runs.token_file(tmp_path)
    start(config(tmp_path / "earlier", tokens), monkeypatch, launch="another")
    return tokens, tmp_path / "earlier"


def test_a_restart_goes_on_from_the_newest_and_not_from_the_one_named(
    earlier: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, folder = earlier
    values = config(tmp_path / "run", tokens).model_dump(include={"token_file", "out_dir"})
    given = RunConfig(**values, resume=str(folder / "step-00000002.safetensors"))
    assert start(given, monkeypatch, fails_at=3).resumed_from == folder / "step-00000002.safetensors"
    # Nothing was saved: as at first.
    assert start(given, monkeypatch, restarts=1, fails_at=5).resumed_from == folder / "step-00000002.safetensors"
    assert start(given, monkeypatch, restarts=2).resumed_from == tmp_path / "run" / "latest.safetensors"
    runs.same_state(tmp_path / "run" / "latest.safetensors", folder / "latest.safetensors")


def test_a_restart_does_not_train_further_steps_twice(
    earlier: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = RunConfig(resume=str(earlier[1] / "step-00000004.safetensors"), steps=6)
    assert start(given, monkeypatch, fails_at=9).trainer.target_step == 10
    again = start(given, monkeypatch, restarts=1)
    assert again.resumed_from == earlier[1] / "latest.safetensors"
    assert (again.trainer.global_step, again.trainer.schedule_start) == (10, 4)


def test_all_ranks_of_a_restart_go_on_to_the_same_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = config(tmp_path / "run", runs.token_file(tmp_path))
    start(given, monkeypatch, fails_at=5, launch="threads")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    found = ranks(2, lambda comm: find_together(given, comm))
    assert [(each.found.checkpoint.info["step"], each.further_steps) for each in found if each] == [(4, None)] * 2


def test_a_run_that_was_refused_is_refused_again(earlier: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart must not go on with another run that happens to be in the folder."""
    for restarts in (0, 1):
        with pytest.raises(UserError, match="already contains a run"):
            start(config(earlier[1], earlier[0], steps=9), monkeypatch, restarts)
