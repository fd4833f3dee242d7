"""What a run's folder holds after saves, kills, damage and resumes; and that nothing of others is ever deleted."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import CheckpointError, SaveError
from protomamba.checkpoint.folder import RunDir, find_resumable, numbered_name
from protomamba.errors import UserError
from protomamba.storage import Disk, write_json


def save(run: RunDir, step: int, *, latest: bool = True, best: bool = False) -> None:
    run.save({"m": {"w": torch.full((4,), float(step))}}, config={"lr": 0.1}, step=step, latest=latest, best=best)


def checkpoints(folder: Path) -> set[str]:
    return {path.name for path in folder.glob("*.safetensors")}


def step_in(path: Path) -> int:
    return int(checkpoint.load(path).parts["m"]["w"][0])


def damage(path: Path) -> None:
    """Flip one bit of the last tensor in place, as a bad disk would: other names of the same file suffer too."""
    with open(path, "r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last ^ 1]))


def resume(folder: Path, keep_last: int = 1) -> tuple[RunDir, int]:
    found = find_resumable(folder)
    assert found is not None
    run = RunDir(folder, keep_last)
    run.adopt(found.path, found.checkpoint)
    return run, found.checkpoint.info["step"]


@pytest.mark.parametrize("keep_last", [0, 1, 3])
def test_latest_and_the_ones_before_it_are_kept(tmp_path: Path, keep_last: int) -> None:
    run = RunDir(tmp_path, keep_last)
    for step in range(10, 70, 10):
        save(run, step)
    kept = [f"step-{step:08d}.safetensors" for step in (50, 40, 30)[:keep_last]]
    assert checkpoints(tmp_path) == {"latest.safetensors", *kept}
    assert step_in(run.latest) == 60
    assert all(step_in(tmp_path / name) == int(name[5:13]) for name in kept)


def test_best_is_written_once_with_latest_or_alone(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save(run, 1, best=True)
    assert run.best.samefile(run.latest)
    save(run, 2)
    assert step_in(run.best) == 1 and step_in(run.latest) == 2
    save(run, 3, latest=False, best=True)
    assert step_in(run.best) == 3 and step_in(run.latest) == 2


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    plan=st.lists(
        st.tuples(st.integers(1, 5), st.booleans(), st.sampled_from(["go on", "resume", "damage"])), max_size=8
    ),
    keep_last=st.integers(0, 3),
)
def test_whatever_happens_only_files_of_this_run_go(
    tmp_path: Path, plan: list[tuple[int, bool, str]], keep_last: int
) -> None:
    folder = tmp_path / "run"
    shutil.rmtree(folder, ignore_errors=True)
    run = RunDir(folder, keep_last)
    foreign = {"step-00000003.safetensors", "step-00000900.safetensors", "notes.txt", "step-1.safetensors", "mine.tmp"}
    other = RunDir(tmp_path / "other")
    save(other, 3)
    for name in foreign:
        shutil.copy(other.latest, folder / name)
    (folder / "step-00000004.safetensors").write_text("not a checkpoint at all")
    foreign.add("step-00000004.safetensors")
    contents = {name: (folder / name).read_bytes() for name in foreign}
    step = 10
    for advance, best, event in plan:
        step += advance
        save(run, step, best=best)
        if event != "go on":
            if event == "damage" and keep_last and (run.folder / numbered_name(step - advance)).exists():
                damage(run.latest)
            run, step = resume(folder, keep_last)
        numbered = {name for name in checkpoints(folder) if name.startswith("step-")} - foreign
        assert len(numbered) <= keep_last
        assert all(int(name[5:13]) <= step for name in numbered)
    assert {name: (folder / name).read_bytes() for name in foreign} == contents


def test_damage_to_latest_leads_to_the_one_before_and_is_told(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    for step in (10, 20, 30):
        save(run, step)
    damage(run.latest)
    found = find_resumable(tmp_path)
    assert found is not None and found.path == run.folder / numbered_name(20) and found.checkpoint.info["step"] == 20
    assert "latest.safetensors: m: tensor 'm.w' is damaged" in found.warnings[0]
    assert found.warnings[1] == f"resuming from {found.path} (step 20)"


def test_a_newer_best_is_preferred_to_an_older_numbered_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save(run, 10)
    save(run, 20)
    save(run, 25, latest=False, best=True)
    run.latest.unlink()
    found = find_resumable(tmp_path)
    assert found is not None and found.path == run.best and "latest.safetensors: missing" in found.warnings[0]
    damage(run.best)
    found = find_resumable(tmp_path)
    assert found is not None and found.path == run.folder / numbered_name(10) and len(found.warnings) == 3


def test_nothing_whole_is_an_error_and_nothing_at_all_is_none(tmp_path: Path) -> None:
    assert find_resumable(tmp_path / "missing") is None
    assert find_resumable(tmp_path) is None
    (tmp_path / "config.json").write_text("{}")
    assert find_resumable(tmp_path) is None
    run = RunDir(tmp_path)
    save(run, 10)
    save(run, 20)
    damage(run.latest)
    (run.folder / numbered_name(10)).write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"no checkpoint is intact: .*latest.*damaged.*step-00000010"):
        find_resumable(tmp_path)


def test_checkpoints_of_another_run_are_no_fallback(tmp_path: Path) -> None:
    old = RunDir(tmp_path / "old")
    save(old, 500)
    run = RunDir(tmp_path / "run")
    save(run, 10)
    save(run, 20)
    run.write_state({"step": 20})
    shutil.copy(old.latest, run.folder / numbered_name(500))
    damage(run.latest)
    found = find_resumable(run.folder)
    assert found is not None and found.path == run.folder / numbered_name(10)
    # Even its header is gone: the mirror still says whose folder this is.
    run.latest.write_bytes(b"gone")
    found = find_resumable(run.folder)
    assert found is not None and found.path == run.folder / numbered_name(10)


def test_a_damaged_latest_does_not_take_the_place_of_an_older_whole_one(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    save(run, 10)
    save(run, 20)
    damage(run.latest)
    run, step = resume(tmp_path)
    assert step == 10
    save(run, 40)
    assert checkpoints(tmp_path) == {"latest.safetensors", "step-00000010.safetensors"}
    assert step_in(run.folder / numbered_name(10)) == 10 and step_in(run.latest) == 40


def test_going_on_from_an_earlier_step_abandons_what_came_after(tmp_path: Path) -> None:
    run = RunDir(tmp_path, keep_last=3)
    for step in (10, 20, 30, 40):
        save(run, step)
    again = RunDir(tmp_path, keep_last=3)
    again.adopt(run.folder / numbered_name(20), checkpoint.load(run.folder / numbered_name(20)))
    assert again.run_id == run.run_id
    save(again, 25)
    assert checkpoints(tmp_path) == {"latest.safetensors", "step-00000010.safetensors", "step-00000020.safetensors"}


def test_a_checkpoint_from_elsewhere_begins_a_run_of_its_own(tmp_path: Path) -> None:
    source = RunDir(tmp_path / "a")
    save(source, 10)
    run = RunDir(tmp_path / "b")
    run.adopt(source.latest, checkpoint.load(source.latest))
    assert run.run_id != source.run_id


def test_a_fresh_run_does_not_overwrite_another(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.refuse_if_occupied()
    save(run, 10)
    with pytest.raises(UserError, match=r"already contains a run \(latest.safetensors\): .*--resume auto"):
        RunDir(tmp_path).refuse_if_occupied()
    run.latest.rename(run.folder / numbered_name(10))
    with pytest.raises(UserError, match=r"already contains a run \(step-00000010.safetensors\)"):
        RunDir(tmp_path).refuse_if_occupied()


def test_what_killed_saves_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    ours = [".latest.safetensors.123-0.tmp", ".step-00000010.safetensors.9-12.tmp", ".run_state.json.1-1.tmp"]
    others = [".latest.safetensors.tmp", ".notes.safetensors.123-0.tmp", "latest.safetensors.123-0.tmp", ".x.tmp"]
    for name in ours + others:
        (tmp_path / name).write_text("x")
    RunDir(tmp_path)
    assert sorted(os.listdir(tmp_path)) == sorted(others)


def test_space_for_the_whole_run_is_asked_for_at_the_start(tmp_path: Path) -> None:
    class Small(Disk):
        def free_bytes(self, folder: Path) -> int:
            return 5000

    run = RunDir(tmp_path, keep_last=2, disk=Small())
    run.require_space(1000)
    with pytest.raises(UserError, match=r"need 5,005 bytes .* 5,000 are free: .*--keep-last"):
        run.require_space(1001)
    save(run, 1, best=True)
    there = run.latest.stat().st_size
    run.require_space((5000 + there) // 5)
    with pytest.raises(UserError):
        run.require_space((5000 + there) // 5 + 1)


def test_a_numbered_checkpoint_that_cannot_be_removed_is_reported_after_the_save(tmp_path: Path) -> None:
    class Keeps(Disk):
        def unlink(self, path: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    run = RunDir(tmp_path, keep_last=1, disk=Keeps())
    save(run, 1)
    save(run, 2)
    with pytest.raises(SaveError, match=r"saved, but step-00000001\.safetensors could not be removed"):
        save(run, 3)
    assert step_in(run.latest) == 3


def test_json_is_atomic_readable_and_strict(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    run.write_config({"lr": 1e-4})
    run.write_state({"step": 3, "best": None})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1e-4}
    assert json.loads((tmp_path / "run_state.json").read_text()) == {"run_id": run.run_id, "step": 3, "best": None}
    with pytest.raises(ValueError):
        write_json(tmp_path / "config.json", {"x": math.nan})
    assert json.loads((tmp_path / "config.json").read_text()) == {"lr": 1e-4}


def test_a_folder_that_cannot_be_made_is_a_line_for_people(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="the folder cannot be created"):
        RunDir(tmp_path / "file" / "run")


def test_saves_leave_the_table_of_interned_strings_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pathlib interns parts of paths: names that come once, ten thousands of them, made that table grow for good."""
    run = RunDir(tmp_path / "run", keep_last=2)
    for step in (1, 2, 3, 4):
        save(run, step)
    interned: list[str] = []
    intern = sys.intern
    monkeypatch.setattr(sys, "intern", lambda text: interned.append(text) or intern(text))
    for step in (5, 6, 7):
        save(run, step)
        run.write_state({"step": step})
    assert not [name for name in interned if re.search(r"step-|\.tmp", name)], interned
    assert len(checkpoints(tmp_path / "run")) == 3
