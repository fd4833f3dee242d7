"""Promise 2 of the reliability design: the n-th call of a save fails, or the process dies there, for every n."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import disk_faults
from tests.disk_faults import CountingDisk, FailingDisk, ShortDisk, TinyRun, acknowledged_step, what_is_wrong

from protomamba.checkpoint import file as checkpoint
from protomamba.errors import UserError
from protomamba.storage import (
    Disk,
    DurabilityUnknownError,
    NotCommittedError,
    SaveError,
    commit,
    commit_link,
    remove_stale_temporaries,
)


def parts(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((7,), value), "b": torch.full((2, 3), value, dtype=torch.bfloat16)}}


def number_of_calls(tmp_path: Path) -> int:
    disk = CountingDisk()
    checkpoint.save(tmp_path / "counted", parts(0.0), config={}, disk=disk)
    (tmp_path / "counted").unlink()
    return len(disk.calls)


def test_the_order_of_a_commit(tmp_path: Path) -> None:
    disk = CountingDisk()
    checkpoint.save(tmp_path / "c.safetensors", parts(1.0), config={}, disk=disk)
    writes = ["write"] * 3  # the header and two tensors
    assert disk.calls == ["free_bytes", "open", *writes, "fsync", "close", "replace", "fsync_dir"]


@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("code", disk_faults.ERRORS.values(), ids=disk_faults.ERRORS)
def test_every_call_of_a_save_may_fail(tmp_path: Path, code: int, forever: bool) -> None:
    path = tmp_path / "c.safetensors"
    kinds = set()
    for n in range(number_of_calls(tmp_path)):
        checkpoint.save(path, parts(1.0), config={})
        before = path.read_bytes()
        disk = FailingDisk(n, code, forever)
        with pytest.raises(SaveError, match=r"c\.safetensors: ") as caught:
            checkpoint.save(path, parts(2.0), config={}, disk=disk)
        kinds.add(type(caught.value))
        if isinstance(caught.value, NotCommittedError):
            assert path.read_bytes() == before, disk.calls
            assert "bytes needed" in str(caught.value) and "bytes free" in str(caught.value)
        else:
            assert isinstance(caught.value, DurabilityUnknownError)
            assert checkpoint.load(path).parts["model"]["w"][0] == 2.0
        if not forever:
            assert os.listdir(tmp_path) == [path.name], disk.calls
        remove_stale_temporaries(tmp_path, lambda name: name == path.name)
        assert os.listdir(tmp_path) == [path.name]
    assert kinds == {NotCommittedError, DurabilityUnknownError}


@pytest.mark.parametrize("most", [1, 7, 4096])
def test_short_writes_are_continued(tmp_path: Path, most: int) -> None:
    path = tmp_path / "c.safetensors"
    report = checkpoint.save(path, parts(3.0), config={}, disk=ShortDisk(most))
    assert report.bytes == path.stat().st_size
    assert torch.equal(checkpoint.load(path).parts["model"]["w"], parts(3.0)["model"]["w"])


def test_a_write_of_nothing_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotCommittedError, match="wrote nothing"):
        checkpoint.save(tmp_path / "c.safetensors", parts(3.0), config={}, disk=ShortDisk(0))
    assert os.listdir(tmp_path) == []


def test_too_little_space_is_told_before_anything_is_written(tmp_path: Path) -> None:
    class Full(CountingDisk):
        def free_bytes(self, folder: Path) -> int:
            return 100

    disk = Full()
    with pytest.raises(
        NotCommittedError, match=r"c\.safetensors: not saved \(not enough.*\): [\d,]+ bytes needed, 100 b"
    ):
        checkpoint.save(tmp_path / "c.safetensors", parts(3.0), config={}, disk=disk)
    assert "open" not in disk.calls


def test_an_interrupt_in_the_middle_leaves_nothing_behind(tmp_path: Path) -> None:
    def chunks() -> Any:
        yield memoryview(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        commit(tmp_path / "file", 8, chunks())
    assert os.listdir(tmp_path) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        checkpoint.save(tmp_path / "no" / "c.safetensors", parts(1.0), config={})


def test_a_link_that_is_not_possible_becomes_a_copy(tmp_path: Path) -> None:
    class NoLinks(Disk):
        def link(self, source: Path, target: Path) -> None:
            raise OSError(errno.EPERM, "Operation not permitted")

    source, target = tmp_path / "a", tmp_path / "b"
    source.write_bytes(os.urandom(3 << 20))
    commit_link(source, target, NoLinks())
    assert target.read_bytes() == source.read_bytes() and not target.samefile(source)
    commit_link(source, tmp_path / "c")
    assert source.samefile(tmp_path / "c")
    with pytest.raises(NotCommittedError):
        commit_link(tmp_path / "missing", target)
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]


def test_a_planted_symbolic_link_is_not_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "temporary").symlink_to(victim)
    with pytest.raises(OSError):
        Disk().open(tmp_path / "temporary")
    (tmp_path / "c.safetensors").symlink_to(victim)
    checkpoint.save(tmp_path / "c.safetensors", parts(1.0), config={})
    assert victim.read_text() == "mine" and not (tmp_path / "c.safetensors").is_symlink()


def _loop_trials(tmp_path: Path, code: int, forever: bool, stride: int = 1) -> None:
    counting = CountingDisk()
    (tmp_path / "uncut").mkdir()
    uncut = TinyRun(tmp_path / "uncut", counting).run()
    for n, name in list(enumerate(counting.calls))[::stride]:
        folder = tmp_path / f"{n}"
        folder.mkdir()
        run = TinyRun(folder, FailingDisk(n, code, forever))
        assert torch.equal(run.run(), uncut), "a failing save must not touch training"
        problem = what_is_wrong(folder, uncut, acknowledged_step(folder))
        assert problem is None, f"call {n} ({name}): {problem}"


def test_any_call_of_a_training_run_may_fail(tmp_path: Path) -> None:
    _loop_trials(tmp_path, errno.EIO, forever=False, stride=4)


def test_the_disk_may_be_full_from_some_call_on(tmp_path: Path) -> None:
    _loop_trials(tmp_path, errno.ENOSPC, forever=True, stride=4)


@pytest.mark.slow
@pytest.mark.parametrize("forever", [False, True], ids=["once", "from-then-on"])
@pytest.mark.parametrize("code", disk_faults.ERRORS.values(), ids=disk_faults.ERRORS)
def test_every_call_of_a_training_run_may_fail(tmp_path: Path, code: int, forever: bool) -> None:
    _loop_trials(tmp_path, code, forever)


def _kill_trials(stride: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, disk_faults.__file__, str(stride)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def test_a_kill_at_a_sample_of_calls() -> None:
    report = _kill_trials(stride=21)
    assert report["failures"] == [] and report["trials"] >= 6


@pytest.mark.slow
def test_a_kill_before_and_after_every_call() -> None:
    report = _kill_trials(stride=1)
    assert report["failures"] == [] and report["trials"] == 2 * report["calls"]


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder"])
def test_what_is_no_file_is_not_replaced_by_one(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Root that saved to /dev/null had a file of that name afterwards, and the system no /dev/null."""
    monkeypatch.chdir(tmp_path)  # the path of a socket has at most 108 bytes
    target = Path("target")
    if kind == "fifo":
        os.mkfifo(target)
    elif kind == "folder":
        target.mkdir()
    else:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(target))
    before = target.lstat()
    with pytest.raises(NotCommittedError, match="target: not saved: expected a file or nothing there, found a"):
        checkpoint.save(target, {"model": {"w": torch.ones(2)}}, config={})
    assert target.lstat() == before and os.listdir() == ["target"]


@pytest.mark.parametrize("name", ["", "a\0b", "no/such/folder/x", "x" * 300, "file/below"])
def test_a_name_no_file_can_have_is_a_save_that_failed(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(NotCommittedError) as caught:
        checkpoint.save(name, {"model": {"w": torch.ones(2)}}, config={})
    assert "\n" not in str(caught.value) and "not saved" in str(caught.value) and os.listdir() == ["file"]
