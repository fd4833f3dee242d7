"""What disturbs `prepare events|fasta|labels`: another one, its death, inputs that change, a folder of other things."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from protomamba.data import event_buckets, fasta, prepare_labels
from protomamba.data.claim import PROGRESS_FILE, PrepareLock
from protomamba.data.events import EventOptions, prepare_events
from protomamba.data.index import CACHE_FOLDER
from protomamba.data.labelled_tables import LabelColumns
from protomamba.data.prepare import prepare
from protomamba.data.prepared import open_prepared
from protomamba.errors import UserError
from tests.data.test_prepare_faults import CHANGES, contents, through
from tests.disk_faults import CountingDisk, KillingDisk
from tests.marks import slow

FILES = {
    "events": ("e.csv", "user,time,item\n" + "".join(f"u{i % 9},{i},i{i * i % 7}\n" for i in range(90))),
    "fasta": ("g.fa", "".join(f">r{i}\n{'ACGT' * (i + 3)}\n" for i in range(20))),
    "labels": ("l.csv", "text,label\n" + "".join(f"{'ab'[i % 2] * (1 + i % 5)},{'yn'[i % 2]}\n" for i in range(60))),
}
MAKE: dict[str, Callable[[Path, Path], Any]] = {
    "events": lambda file, out: prepare_events([file], out, EventOptions("user", "item", "time")),
    "fasta": lambda file, out: fasta.prepare_fasta([file], out),
    "labels": lambda file, out: prepare_labels.prepare_labels([file], out, LabelColumns("label", "text")),
}
READS = {
    "events": (event_buckets, "read_blocks"),
    "fasta": (fasta, "parts_of"),
    "labels": (prepare_labels, "read_examples"),
}


def source(folder: Path, kind: str) -> Path:
    name, text = FILES[kind]
    (folder / name).write_text(text)
    return folder / name


def named_and_there(folder: Path) -> bool:
    """Whether a folder without a manifest, or with one whose every file is there as it says."""
    return not (folder / "manifest.json").exists() or bool(open_prepared(folder))


@pytest.mark.parametrize("kind", MAKE)
def test_a_second_prepare_into_one_folder_is_refused(kind: str, tmp_path: Path) -> None:
    file, out = source(tmp_path, kind), tmp_path / "out"
    out.mkdir()
    with PrepareLock(out), pytest.raises(UserError, match=rf"out: in use by another prepare \(pid {os.getpid()} on"):
        MAKE[kind](file, out)
    assert contents(out) == {}
    MAKE[kind](file, out)
    assert open_prepared(out) and not (out / PROGRESS_FILE).exists()


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("kind", MAKE)
def test_an_input_that_changes_while_it_is_read_is_named_and_nothing_of_it_is_kept(
    kind: str, change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, out, (module, reads) = source(tmp_path, kind), tmp_path / "out", READS[kind]
    read = getattr(module, reads)

    def disturbed(*args: Any) -> Iterator[Any]:
        for number, part in enumerate(read(*args)):
            if not number:
                CHANGES[change](file)
            yield part

    with monkeypatch.context() as patched, pytest.raises(UserError) as caught:
        patched.setattr(module, reads, disturbed)
        MAKE[kind](file, out)
    assert f"{file.name}: " in str(caught.value) and "\n" not in str(caught.value)
    assert ("changed while it was read" in str(caught.value)) == (change not in ("is gone", "is a folder"))
    assert set(contents(out)) == {PROGRESS_FILE}
    if file.is_dir():
        file.rmdir()
    MAKE[kind](source(tmp_path, kind), out)
    MAKE[kind](file, tmp_path / "undisturbed")
    assert contents(out) == contents(tmp_path / "undisturbed")


@pytest.mark.parametrize("stride", [9, slow(1)])
@pytest.mark.parametrize("kind", MAKE)
def test_a_prepare_killed_at_any_call_and_started_again_ends_the_same(
    kind: str, stride: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, counting = source(tmp_path, kind), CountingDisk()
    with through(counting, monkeypatch):
        MAKE[kind](file, tmp_path / "uncut")
    uncut, total = contents(tmp_path / "uncut"), len(counting.calls)
    assert total > 20
    for n in range(0, total, stride):
        out = tmp_path / f"{n}"
        for after in (False, True):
            if (child := os.fork()) == 0:
                with through(KillingDisk(n if not after else n // 2, after), monkeypatch):
                    MAKE[kind](file, out)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert after or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
            assert named_and_there(out), f"call {n}"
        MAKE[kind](file, out)
        assert contents(out) == uncut, f"call {n} ({counting.calls[n]})"
        # Where the call was killed behind its last file, looking at the folder has left an index beside the data.
        left = {path.name for path in out.iterdir() if path.is_dir()} - {CACHE_FOLDER}
        assert not left, "rows that were spread lie there still"


def test_what_a_killed_call_of_another_kind_left_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, labels = tmp_path / "out", source(tmp_path, "labels")
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(prepare_labels.PreparedManifest, "write", _dies)
        MAKE["labels"](labels, out)
    assert (out / "train-values.npy").exists()
    MAKE["events"](source(tmp_path, "events"), out)
    MAKE["events"](tmp_path / "e.csv", tmp_path / "alone")
    assert contents(out) == contents(tmp_path / "alone")


def _dies(self: object) -> None:
    raise RuntimeError("killed")


@pytest.mark.parametrize("name", ["tokens.bin", "train-values.npy", "shard-00000.bin"])
def test_somebody_elses_files_are_left_alone(name: str, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    np.arange(4).tofile(out / name)
    before = (out / name).read_bytes()
    with pytest.raises(UserError, match="out: holds other data; choose an empty --out-dir"):
        MAKE["fasta"](source(tmp_path, "fasta"), out)
    assert (out / name).read_bytes() == before


def test_text_and_sequences_keep_apart(tmp_path: Path) -> None:
    events = source(tmp_path, "events")
    MAKE["events"](events, tmp_path / "events")
    with pytest.raises(UserError, match="choose an empty --out-dir"):
        prepare([events], tmp_path / "events", format="text")
    prepare([events], tmp_path / "text", format="text")
    with pytest.raises(UserError, match="choose an empty --out-dir"):
        MAKE["events"](events, tmp_path / "text")
    assert json.loads((tmp_path / "events" / "manifest.json").read_text())["kind"] == "events"


def test_a_folder_as_an_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected a file, found a folder: name the files in it"):
        MAKE["fasta"](tmp_path, tmp_path / "out")
