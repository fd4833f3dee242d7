"""A disk that lies: every state a power cut may leave is loaded, and nothing that was acknowledged is gone."""

from __future__ import annotations

import errno
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from protomamba import storage
from protomamba.storage import Disk, SaveError, commit, make_folder
from tests.disk_faults import CountingDisk, FailingDisk, TinyRun, what_is_wrong
from tests.marks import slow
from tests.reliability.crash_states import Call, Folder, RecordingDisk, after_each_call, put
from tests.reliability.promises import Trials
from tests.runs import losses, token_file, train


class AcknowledgingRun(TinyRun):
    """Notes after how many calls of the disk which step's save was acknowledged to the outside."""

    acknowledged: list[tuple[int, int]]

    def _save(self, run_dir: Any, log: Any) -> None:
        super()._save(run_dir, log)
        assert isinstance(self.disk, RecordingDisk) and not self.errors
        self.acknowledged.append((len(self.disk.calls), self.step))


@pytest.mark.parametrize("keep_last", [slow(0), 1, slow(2)])
@pytest.mark.parametrize("most", [6, slow(400)])
def test_every_state_a_power_cut_may_leave_goes_on_to_the_same_end(
    most: int, keep_last: int, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, rng = trials(2), random.Random(most)
    home = tmp_path / "recorded"
    home.mkdir()
    disk = RecordingDisk(home)
    run = AcknowledgingRun(home, disk, keep_last)
    run.acknowledged = []
    uncut = run.run()
    assert [call.name for call in disk.calls].count("rename") > 6
    for number, (done, state) in enumerate(after_each_call(disk.calls, rng, most)):
        folder = tmp_path / f"{number}"
        put(state, folder)
        promised = max((step for calls, step in run.acknowledged if calls <= done), default=0)
        problem = what_is_wrong(folder, uncut, promised)
        counted.add(problem and f"after call {done} ({disk.calls[done - 1].name}): {sorted(state)}: {problem}")
        shutil.rmtree(folder)
    counted.finish()


def test_the_name_of_the_metrics_is_on_the_disk_before_a_checkpoint(tmp_path: Path) -> None:
    """A power cut after the first save could leave its checkpoint and no metrics.jsonl: the steps' lines were lost."""
    disk = RecordingDisk(tmp_path)
    TinyRun(tmp_path, disk).run()
    calls = [call.name for call in disk.calls]
    assert "fsync_dir" in calls[: calls.index("rename")]


def test_the_model_of_the_disk_allows_what_it_must() -> None:
    """A writer that does not sync before its rename is caught: the new name may hold nothing, or zeros."""
    careless = [Call("create", ("t", 1)), Call("write", (1, b"new")), Call("rename", ("t", "f"))]
    folder = Folder(sure={"f": 0}, now={"f": 0}, files={0: _sure(b"old")})
    for call in careless:
        folder.do(call)
    seen = {tuple(sorted(state.items())) for state in folder.states(random.Random(0), 1_000)}
    for content in (b"old", b"new", b"", b"\0\0\0"):
        assert any(("f", content) in state for state in seen), content
    folder.do(Call("fsync", (1,)))
    folder.do(Call("fsync_dir", ()))
    assert list(folder.states(random.Random(0), 1_000)) == [{"f": b"new"}]


def _sure(content: bytes) -> Any:
    from tests.reliability.crash_states import File

    return File(content)


def test_a_new_folder_is_made_for_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name of a folder is in the folder above it: without a sync there, all of a new run may be gone."""
    synced: list[Path] = []
    monkeypatch.setattr(Disk, "fsync_dir", lambda self, folder: synced.append(folder))
    make_folder(tmp_path / "a" / "b" / "c")
    assert set(synced) == {tmp_path, tmp_path / "a", tmp_path / "a" / "b"}
    synced.clear()
    make_folder(tmp_path / "a" / "b" / "c")
    assert synced == []


CODES = ["EINTR", "EDQUOT", "ESTALE", "ENOSPC", "EROFS", "EIO", "EACCES", "EMFILE", "ENFILE", "ETIMEDOUT"]


@pytest.mark.parametrize("name", CODES)
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from then on"])
def test_any_error_of_the_disk_leaves_the_former_file_and_is_one_line(
    name: str, forever: bool, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    """Quota, stale handles, no inodes, a disk that turns read-only: once at each call of a save, and from it on."""
    counted, code = trials(2), getattr(errno, name)
    counting = CountingDisk()
    path = tmp_path / "file"
    old, new = b"old" * 100, b"new" * 200
    commit(path, len(new), [memoryview(new)], counting)
    for n in range(len(counting.calls)):
        path.write_bytes(old)
        problem = None
        try:
            commit(path, len(new), [memoryview(new)], FailingDisk(n, code, forever))
        except SaveError as error:
            text = str(error)
            problem = None if str(path) in text and os.strerror(code) in text and "\n" not in text else text
            durable = isinstance(error, storage.DurabilityUnknownError)
            if path.read_bytes() != (new if durable else old):
                problem = f"{text}, and the file is another"
        else:
            problem = None if path.read_bytes() == new else "no error, and the file is not there"
        counted.add(problem and f"call {n} ({counting.calls[n]}): {problem}")
        for left in tmp_path.glob(".*.tmp"):
            assert forever, f"{left} was left behind"
            left.unlink()
    counted.finish()


@pytest.mark.parametrize("what", ["renamed", "deleted"])
@pytest.mark.parametrize("policy", ["stop", "continue"])
def test_a_folder_that_goes_away_during_the_run_is_said(
    what: str, policy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, calls = tmp_path / "run", [0]
    real = Disk.fsync

    def fsync(self: Disk, fd: int) -> None:
        real(self, fd)
        calls[0] += 1
        if calls[0] == 12 and folder.exists():
            folder.rename(tmp_path / "away") if what == "renamed" else shutil.rmtree(folder)

    monkeypatch.setattr(Disk, "fsync", fsync)
    steps = ["--steps", 12, "--save-every", 2, "--on-save-error", policy]
    code = train(folder, token_file(tmp_path), *steps)
    said = capsys.readouterr()
    assert calls[0] >= 12, "the folder never went away"
    assert "No such file or directory" in said.err + said.out and "Traceback" not in said.err
    assert code == (1 if policy == "stop" else 0)
    if what == "renamed":
        monkeypatch.undo()
        assert train(tmp_path / "away", tmp_path / "tokens.txt", *steps, "--resume", "auto") == 0
        assert sorted(losses(tmp_path / "away")) == list(range(1, 13))
