"""What disturbs a `prepare`: another one, its death, inputs that change, folders with odd things in them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from protomamba import storage
from protomamba.data import claim, documents, open_token_dir
from protomamba.data import prepare as preparing
from protomamba.data.documents import find_sources
from protomamba.data.prepare import prepare
from protomamba.errors import UserError
from protomamba.storage import Disk
from tests.disk_faults import CountingDisk, KillingDisk
from tests.marks import slow

LOCK = claim.PrepareLock.name
CALLS = ("free_bytes", "open", "write", "fsync", "close", "replace", "fsync_dir", "unlink")


def text_files(folder: Path, count: int = 3, lines: int = 60) -> Path:
    folder.mkdir()
    for number in range(count):
        (folder / f"{number}.txt").write_text("".join(f"file {number} line {n}\n" for n in range(lines)))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """All files but the lock, which is empty; what a reader keeps of them lies in a folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and path.name != LOCK}


def named_and_there(folder: Path) -> bool:
    """Whether a folder without a manifest, or with one that names just what is there."""
    if not (folder / "manifest.json").exists():
        return True
    named = {shard["name"] for shard in json.loads((folder / "manifest.json").read_text())["shards"]}
    return named == {path.name for path in folder.glob("shard-*.bin")} and open_token_dir(folder, "bin").tokens > 0


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents.chunks_of, "__defaults__", (0, 97))
    monkeypatch.setattr(documents.grouped, "__defaults__", (131,))


HOLDING = """
import sys
from protomamba.data.claim import PrepareLock
with PrepareLock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_prepare_into_one_folder_is_refused_and_names_the_first(tmp_path: Path) -> None:
    texts, out = text_files(tmp_path / "in"), tmp_path / "out"
    out.mkdir()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", HOLDING, out], stdin=pipe, stdout=pipe, text=True) as first:
        assert first.stdout is not None and first.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"out: in use by another prepare \(pid {first.pid} on host"):
            prepare([texts], out)
        assert contents(out) == {}
        first.kill()
    assert prepare([texts], out).tokens > 0


def test_many_at_the_same_time_leave_what_one_leaves(tmp_path: Path) -> None:
    """Real commands started together: each is done or refused in one line, and the folder is as one leaves it."""
    texts = text_files(tmp_path / "in", lines=3_000)
    prepare([texts], tmp_path / "alone", shard_tokens=10_000)
    command = [sys.executable, "-m", "protomamba", "prepare", texts, "--out-dir", tmp_path / "out"]
    together = [
        subprocess.Popen(list(map(str, [*command, "--shard-tokens", 10_000])), stderr=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    for process in together:
        said = process.communicate()[1]
        refused = process.returncode == 1 and "in use by another prepare" in said and said.count("\n") == 1
        assert process.returncode == 0 or refused, said
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("stride", [7, slow(1)])
def test_a_prepare_killed_at_any_call_and_started_again_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stride: int
) -> None:
    texts, counting = text_files(tmp_path / "in"), CountingDisk()
    with through(counting, monkeypatch):
        prepare([texts], tmp_path / "uncut", shard_tokens=700)
    uncut, total = contents(tmp_path / "uncut"), len(counting.calls)
    assert total > 40 and sum(name.endswith(".bin") for name in uncut) > 3
    for n in range(0, total, stride):
        out = tmp_path / f"{n}"
        for after in (False, True):  # the second goes on in what the first left, and dies there
            if (child := os.fork()) == 0:
                with through(KillingDisk(n if not after else n // 2, after), monkeypatch):
                    prepare([texts], out, shard_tokens=700)
                os._exit(0)
            status = os.waitpid(child, 0)[1]
            assert after or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL)
            assert named_and_there(out), f"call {n}"
        prepare([texts], out, shard_tokens=700)
        assert contents(out) == uncut, f"call {n} ({counting.calls[n]})"


class through:
    """While it lasts every call of the writer goes to another disk."""

    def __init__(self, disk: Disk, monkeypatch: pytest.MonkeyPatch) -> None:
        self._disk, self._monkeypatch = disk, monkeypatch

    def __enter__(self) -> None:
        self._context = self._monkeypatch.context()
        patch = self._context.__enter__()
        for name in CALLS:
            patch.setattr(storage.DISK, name, getattr(self._disk, name), raising=True)

    def __exit__(self, *error: object) -> None:
        self._context.__exit__(None, None, None)


CHANGES = {
    "grows": lambda path: path.write_bytes(path.read_bytes() + b"more\n"),
    "is cut": lambda path: os.truncate(path, 200),
    "is cut to nothing": lambda path: os.truncate(path, 0),
    "is replaced by one of the same length": lambda path: path.write_bytes(b"x" * path.stat().st_size),
    "is gone": lambda path: path.unlink(),
    "is a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.usefixtures("small_units")
@pytest.mark.parametrize("when", [0, 1, 5, 12])
@pytest.mark.parametrize("change", CHANGES)
def test_an_input_that_changes_while_it_is_read_is_named_and_nothing_of_it_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: str, when: int
) -> None:
    texts, out = text_files(tmp_path / "in", count=2), tmp_path / "out"
    victim = texts / "1.txt"
    before = victim.read_bytes()

    def disturbed(groups: Iterator[list[documents.Piece]]) -> Iterator[list[documents.Piece]]:
        for number, group in enumerate(groups):
            if number == when and group[0].data.startswith(b"file 1") and armed:
                armed.clear()
                CHANGES[change](victim)
            yield group

    whole, armed = documents.grouped, [True]
    monkeypatch.setattr(preparing, "grouped", lambda pieces: disturbed(whole(pieces)))
    try:
        prepare([texts], out, shard_tokens=300)
    except UserError as error:
        assert "1.txt: " in str(error) and "\n" not in str(error)
    else:
        assert victim.read_bytes() == before, "it changed, and nobody said so"
    assert not (out / "manifest.json").exists() or victim.read_bytes() == before
    if not victim.is_file() or victim.read_bytes() != before:
        if victim.is_dir():
            victim.rmdir()
        victim.write_bytes(before)
        prepare([texts], out, shard_tokens=300)
        prepare([texts], tmp_path / "undisturbed", shard_tokens=300)
        for name, body in contents(tmp_path / "undisturbed").items():
            assert contents(out)[name] == body, f"{name} holds what was read in between"


def make_odd(folder: Path, kind: str) -> None:
    odd = folder / "odd"
    if kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(str(odd))
    elif kind == "fifo":
        os.mkfifo(odd)
    elif kind == "link to itself":
        odd.symlink_to(odd)
    elif kind == "link to nothing":
        odd.symlink_to(folder / "nothing")
    elif kind == "link to a device":
        odd.symlink_to("/dev/zero")
    elif kind == "link to the folder itself":
        odd.symlink_to(folder)
    elif kind == "links that lead to each other":
        (folder / "a").mkdir()
        (folder / "b").mkdir()
        (folder / "a" / "odd").symlink_to(folder / "b")
        (folder / "b" / "odd").symlink_to(folder / "a")


ODD = {
    "socket": "odd: expected a regular file, found a device, pipe or socket",
    "fifo": "odd: expected a regular file, found a device, pipe or socket",
    "link to a device": "odd: expected a regular file, found a device, pipe or socket",
    "link to itself": "odd: cannot be read: Too many levels of symbolic links",
    "link to nothing": "odd: cannot be read: No such file or directory",
    "link to the folder itself": "odd: a link that leads back to ",
    "links that lead to each other": "odd: a link that leads back to ",
}


@pytest.mark.parametrize("kind", ODD)
def test_what_is_no_file_is_named(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = text_files(tmp_path / "in")
    monkeypatch.chdir(texts)  # the path of a socket has at most 108 bytes
    make_odd(Path(), kind) if kind in ("socket", "fifo") else make_odd(texts, kind)
    with pytest.raises(UserError) as caught:
        prepare([texts], tmp_path / "out")
    assert ODD[kind] in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_linked_folder_is_read_and_two_links_to_one_are_no_loop(tmp_path: Path) -> None:
    """Left out without a word, as a plain walk does, a linked folder of data would be missing in the shards."""
    texts, linked = tmp_path / "in", text_files(tmp_path / "elsewhere")
    texts.mkdir()
    (texts / "one").symlink_to(linked)
    (texts / "two").symlink_to(linked)
    assert [source.name for source in find_sources([texts], "auto")] == [
        f"{way}/{number}.txt" for way in ("one", "two") for number in range(3)
    ]


@pytest.fixture
def as_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to work in, for a user without rights: root may read everything."""
    home = tmp_path / "home"
    home.mkdir()
    home.chmod(0o777)
    monkeypatch.chdir(home)
    former = os.geteuid()
    if former == 0:
        text_files(Path("in"))
        os.seteuid(65_534)
    else:
        text_files(Path("in"))
    yield Path()
    if former == 0:
        os.seteuid(0)


@pytest.mark.parametrize("kind", ["file", "folder", "folder without the right to enter", "out"])
def test_what_may_not_be_read_is_named(kind: str, as_nobody: Path) -> None:
    mine = os.geteuid()
    if mine == 65_534:
        os.seteuid(0)
    (as_nobody / "in" / "sub").mkdir()
    (as_nobody / "in" / "sub" / "text.txt").write_text("text\n")
    target, mode = {
        "file": (as_nobody / "in" / "1.txt", 0),
        "folder": (as_nobody / "in" / "sub", 0),
        "folder without the right to enter": (as_nobody / "in" / "sub", 0o444),
        "out": (as_nobody, 0o555),
    }[kind]
    target.chmod(mode)
    os.seteuid(mine)
    with pytest.raises(UserError) as caught:
        prepare([as_nobody / "in"], as_nobody / "out")
    if mine == 65_534:
        os.seteuid(0)
    target.chmod(0o755)
    os.seteuid(mine)
    name = {"file": "in/1.txt", "folder": "in/sub", "out": "out"}.get(kind, "in/sub")
    assert str(caught.value).startswith(name) and "Permission denied" in str(caught.value)


def test_names_that_are_not_utf8_are_names_like_others(tmp_path: Path) -> None:
    texts, out = text_files(tmp_path / "in"), tmp_path / "out"
    odd = Path(os.fsdecode(os.fsencode(texts) + b"/odd-\xff\xfe-\n.txt"))
    odd.write_text("the text in it\n")
    command = [sys.executable, "-m", "protomamba", "prepare", texts, "--out-dir", out]
    for _ in range(2):  # made, and found made
        assert subprocess.run(command, capture_output=True).returncode == 0
    listed = json.loads((out / "manifest.json").read_text())["source"]["inputs"]
    assert odd.name in [entry["name"] for entry in listed]
    odd.write_bytes(b"\xff no text\n")
    again = subprocess.run([*command[:-1], tmp_path / "other"], capture_output=True)
    assert again.returncode == 1 and again.stderr.endswith(b"convert the file, or read it with --format bytes\n")
