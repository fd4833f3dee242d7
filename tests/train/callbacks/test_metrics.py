"""metrics.jsonl: every line parses after anything, steps only rise, and nothing is lost."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import signal
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.disk_faults import CountingDisk, FailingDisk

from protomamba.errors import UserError
from protomamba.metrics_file import read_metrics
from protomamba.storage import Disk, SaveError
from protomamba.train.callbacks import metrics
from protomamba.train.callbacks.metrics import MetricsLog


def steps(path: Path) -> list[int]:
    return [event["step"] for event in read_metrics(path) if event["event"] == "train"]


def write_run(path: Path, first: int, last: int, **options: Any) -> None:
    with MetricsLog(path, **options) as log:
        log.log("run", seed=1)
        for step in range(first, last + 1):
            log.log("train", step=step, loss=1 / step)
        log.log("end", step=last, reason="done")


def test_a_line_has_its_fields_in_order_and_the_time(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log("train", step=1, loss=0.5, bp_applied=True, ff_loss=None)
        log.log("validation", step=1, time=12.5)
    first, second = (tmp_path / "m.jsonl").read_text().splitlines()
    assert first.startswith('{"event": "train", "step": 1, "loss": 0.5, "bp_applied": true, "ff_loss": null, "time": ')
    assert second == '{"event": "validation", "step": 1, "time": 12.5}'


def test_values_of_torch_numpy_and_paths_become_plain(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log("x", a=torch.tensor(2), b=np.float32(0.5), c=np.float64("nan"), d=Path("p"), e=(1, [np.int64(2)]))
        with pytest.raises(TypeError):
            log.log("x", a=object())
    (event,) = read_metrics(tmp_path / "m.jsonl")
    assert (event["a"], event["b"], event["d"], event["e"]) == (2, 0.5, "p", [1, [2]]) and math.isnan(event["c"])


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=4)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("abc", min_size=1, max_size=3), inner, max_size=3)
    ),
    max_leaves=6,
)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(fields=st.dictionaries(st.sampled_from(["loss", "lr", "note", "numbers"]), VALUES))
def test_no_bare_words_and_every_value_comes_back(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        log.log("x", **fields, time=0)

    def refuse(word: str) -> Any:
        raise AssertionError(f"bare {word}")

    (line,) = path.read_bytes().splitlines()
    json.loads(line, parse_constant=refuse)
    (event,) = read_metrics(path)
    assert repr(event) == repr({"event": "x", **fields, "time": 0})


def test_a_non_finite_number_is_null_and_named(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl") as log:
        log.log("train", step=1, loss=math.nan, grads=[1.0, -math.inf])
    raw = json.loads((tmp_path / "m.jsonl").read_text())
    assert raw["loss"] is None and raw["grads"] == [1.0, None]
    assert raw["non_finite"] == {"loss": "nan", "grads.1": "-inf"}


def test_train_steps_that_do_not_rise_are_a_mistake_of_the_caller(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "m.jsonl", resumed_step=7) as log:
        with pytest.raises(ValueError, match="step 7 logged after step 7"):
            log.log("train", step=7)
        log.log("train", step=8)
        with pytest.raises(ValueError):
            log.log("train", step=8)


def test_a_resumed_run_goes_on_after_its_checkpoint_and_earlier_lines_stay(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 9)
    before = path.read_bytes().splitlines()
    write_run(path, 7, 12, resumed_step=6)
    assert path.read_bytes().splitlines()[:7] == before[:7]
    assert steps(path) == list(range(1, 13))
    aside = tmp_path / "metrics.superseded.jsonl"
    assert aside.read_bytes().splitlines() == before[7:]
    # Back again, in front of the first resume: its "run" line goes with what it began.
    write_run(path, 4, 5, resumed_step=3)
    assert steps(path) == [1, 2, 3, 4, 5]
    assert [event["event"] for event in read_metrics(path)].count("run") == 2
    assert len(aside.read_bytes().splitlines()) == 4 + 3 + 8


def test_a_resume_at_the_end_keeps_everything(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 4)
    before = path.read_bytes()
    write_run(path, 5, 6, resumed_step=4)
    assert path.read_bytes().startswith(before) and os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_fresh_run_moves_the_old_lines_aside(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 4)
    before = path.read_bytes()
    write_run(path, 1, 2)
    assert steps(path) == [1, 2] and (tmp_path / "metrics.superseded.jsonl").read_bytes() == before


def test_any_torn_end_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 3)
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in range(len(whole) - last, len(whole) + 1):
        path.write_bytes(whole[:cut])
        assert len(list(read_metrics(path))) == (5 if cut == len(whole) else 4)
        MetricsLog(path, resumed_step=3).close()
        assert path.read_bytes() == (whole if cut == len(whole) else whole[:-last])
    path.write_bytes(whole + b"\0" * 100 + b"\n\0\0")  # what a power cut can leave
    write_run(path, 4, 5, resumed_step=3)
    assert steps(path) == [1, 2, 3, 4, 5]


def test_damage_in_the_middle_is_named_and_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write_run(path, 1, 3)
    lines = path.read_bytes().splitlines(keepends=True)
    lines[1] = b"{broken\n"
    path.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 2: not a JSON object"):
        list(read_metrics(path))
    MetricsLog(path, resumed_step=3).close()
    assert path.read_bytes() == b"".join(lines)


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot be opened for appending: Is a directory"):
        MetricsLog(tmp_path)
    with pytest.raises(UserError, match="cannot be read: No such file"):
        list(read_metrics(tmp_path / "none"))


class FullDisk(Disk):
    """A disk with room for `room` more bytes."""

    room = 0

    def write(self, fd: int, data: memoryview) -> int:
        if self.room == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = min(self.room, len(data))
        self.room -= taken
        return os.write(fd, data[:taken])


@pytest.mark.parametrize("room", [0, 1, 30, 60, 200])
def test_lines_wait_for_room_on_a_full_disk_and_nothing_is_torn(tmp_path: Path, room: int) -> None:
    path, disk, told = tmp_path / "m.jsonl", FullDisk(), list[str]()
    disk.room = room
    with MetricsLog(path, warn=told.append, disk=disk) as log:
        for step in range(1, 8):
            log.log("train", step=step)
            assert path.read_bytes() == b"" or path.read_bytes().endswith(b"\n")
        assert len(told) == 1 and "No space left" in told[0]
        disk.room = 10**6
        log.log("train", step=8)
    assert steps(path) == list(range(1, 9))
    assert len(told) == 2 and "writable again, no line is missing" in told[1]


def test_what_a_full_disk_never_takes_is_told_by_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "MAX_PENDING", 3)
    path, disk, told = tmp_path / "m.jsonl", FullDisk(), list[str]()
    with MetricsLog(path, warn=told.append, disk=disk) as log:
        for step in range(1, 8):
            log.log("train", step=step)
        disk.room = 10**6
        log.log("train", step=8)
    assert steps(path) == [6, 7, 8] and "5 lines could not be written" in told[-1]


def test_any_call_of_the_log_may_fail(tmp_path: Path) -> None:
    def run(path: Path, disk: CountingDisk, told: list[str]) -> None:
        with MetricsLog(path, warn=told.append, disk=disk) as log:
            for step in range(1, 4):
                log.log("train", step=step)
                log.log("checkpoint", step=step)
            log.log("end")

    counting = CountingDisk()
    run(tmp_path / "whole.jsonl", counting, [])
    assert counting.calls.count("fsync") == 5
    for n in range(len(counting.calls)):
        told: list[str] = []
        path = tmp_path / f"{n}.jsonl"
        run(path, FailingDisk(n, errno.EIO), told)
        assert steps(path) == [1, 2, 3] and len(list(read_metrics(path))) == 7
        assert told and "Input/output error" in told[0]


class Stubborn(FullDisk):
    """A full disk whose files cannot be cut either: what is torn stays until it is taken back later."""

    def fsync(self, fd: int) -> None:
        pass


@pytest.mark.parametrize("room", [1, 30, 60, 100])
def test_a_torn_line_that_could_not_be_taken_back_is_so_before_the_next(
    tmp_path: Path, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, disk = tmp_path / "m.jsonl", Stubborn()
    disk.room = room

    def refuse(fd: int, size: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    log = MetricsLog(path, disk=disk)
    with monkeypatch.context() as patch:
        patch.setattr(metrics.os, "ftruncate", refuse)
        log.log("train", step=1, loss=0.123456789)
        log.log("train", step=2, loss=0.123456789)
    disk.room = 10**6
    log.close()
    assert steps(path) == [1, 2] and path.read_bytes().count(b"\n") == 2


@pytest.mark.parametrize("wanted", [True, False])
def test_a_save_that_nothing_acknowledges_fails_where_that_is_asked(tmp_path: Path, wanted: bool) -> None:
    disk, path = FullDisk(), tmp_path / "m.jsonl"
    with MetricsLog(path, must_acknowledge=wanted, disk=disk) as log:
        log.log("train", step=1)
        if wanted:
            with pytest.raises(
                SaveError, match=r"m\.jsonl: the line that acknowledges step 1 .* bytes needed, .* free"
            ):
                log.log("checkpoint", step=1)
        else:
            log.log("checkpoint", step=1)
        disk.room = 10**6
    assert [event["event"] for event in read_metrics(path)] == ["train", "checkpoint"]


def test_rotation_by_copying_and_cutting_leaves_lines_that_parse(tmp_path: Path) -> None:
    """logrotate's copytruncate cuts the file to nothing under the writer; a refusal later must not fill it up again."""
    path, disk = tmp_path / "m.jsonl", FullDisk()
    disk.room = 10**6
    with MetricsLog(path, disk=disk) as log:
        for step in range(1, 5):
            log.log("train", step=step)
        os.truncate(path, 0)
        disk.room = 20
        log.log("train", step=5)
        os.truncate(path, 0)
        disk.room = 10**6
        log.log("train", step=6)
    assert steps(path) == [5, 6]


def test_threads_may_log_beside_each_other(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with MetricsLog(path) as log:
        threads = [
            threading.Thread(target=lambda k=k: [log.log("note", worker=k, n=n) for n in range(300)]) for k in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    seen = [(event["worker"], event["n"]) for event in read_metrics(path)]
    assert sorted(seen) == [(k, n) for k in range(4) for n in range(300)]


@pytest.mark.parametrize("seed", range(5))
def test_a_kill_at_a_random_byte_leaves_lines_that_parse(tmp_path: Path, seed: int) -> None:
    """The process dies by SIGKILL in the middle of a write, after some bytes of a line are out."""

    class Dying(Disk):
        left = random.Random(seed).randrange(1, 400)

        def write(self, fd: int, data: memoryview) -> int:
            written = os.write(fd, data[: self.left])
            self.left -= written
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return written

    path = tmp_path / "m.jsonl"
    child = os.fork()
    if child == 0:
        with MetricsLog(path, disk=Dying()) as log:
            for step in range(1, 100):
                log.log("train", step=step, loss=0.1)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)
    written = steps(path)
    assert written == list(range(1, len(written) + 1))
    resumed = max(0, len(written) - 1)
    with MetricsLog(path, resumed_step=resumed) as log:
        log.log("train", step=resumed + 1)
    assert steps(path) == list(range(1, resumed + 2))
