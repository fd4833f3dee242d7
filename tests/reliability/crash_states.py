"""What a power cut may leave on a disk: the calls of a run, recorded, and every state that POSIX allows after each.

POSIX promises little. What was written since a file's last fsync may be there, not there, there in part or in another
order; what happened to names since the folder's last fsync may have happened in any choice: a rename without the one
before it, an unlink without the link. Only what was synced is sure.
"""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from protomamba.storage import Disk, PathText


@dataclass(frozen=True)
class Call:
    """One recorded call: its name and its arguments, files by a number that outlives their descriptors and names."""

    name: str
    arguments: tuple[Any, ...]


class RecordingDisk(Disk):
    """Does every call and notes it in `calls`; what lies outside `folder` is not noted."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder.resolve()
        self.calls: list[Call] = []
        self._inode_of: dict[int, int] = {}

    def _note(self, name: str, *arguments: Any) -> None:
        self.calls.append(Call(name, arguments))

    def _inode(self, fd: int) -> int:
        """The number of an open file; one that was opened past this disk, as the log is, is noted as created."""
        inode = os.fstat(fd).st_ino
        if inode not in self._inode_of:
            self._inode_of[inode] = len(self._inode_of)
            self._note("create", Path(os.readlink(f"/proc/self/fd/{fd}")).name, self._inode_of[inode])
        return self._inode_of[inode]

    def open(self, path: PathText) -> int:
        fd = super().open(path)
        self._inode_of.pop(os.fstat(fd).st_ino, None)  # the system gives a number again
        self._inode_of[os.fstat(fd).st_ino] = len(self.calls) + 1_000
        self._note("create", os.path.basename(path), self._inode_of[os.fstat(fd).st_ino])
        return fd

    def write(self, fd: int, data: memoryview) -> int:
        inode = self._inode(fd)
        written = super().write(fd, data)
        self._note("write", inode, bytes(data[:written]))
        return written

    def fsync(self, fd: int) -> None:
        inode = self._inode(fd)
        super().fsync(fd)
        self._note("fsync", inode)

    def replace(self, source: PathText, target: PathText) -> None:
        super().replace(source, target)
        self._note("rename", os.path.basename(source), os.path.basename(target))

    def link(self, source: PathText, target: PathText) -> None:
        super().link(source, target)
        self._note("link", os.path.basename(source), os.path.basename(target))

    def unlink(self, path: PathText) -> None:
        super().unlink(path)
        self._note("unlink", os.path.basename(path))

    def fsync_dir(self, folder: Path) -> None:
        super().fsync_dir(folder)
        self._note("fsync_dir")


@dataclass
class File:
    """What is sure of a file, and what was written behind it since."""

    sure: bytes = b""
    pending: list[bytes] = field(default_factory=list)

    def variants(self, rng: random.Random) -> list[bytes]:
        """What it may hold: all, nothing new, parts, the later without the earlier, or the length alone."""
        if not self.pending:
            return [self.sure]
        whole = self.sure + b"".join(self.pending)
        new = len(whole) - len(self.sure)
        torn = whole[: len(self.sure) + rng.randrange(new)]
        holes = self.sure + b"".join(part if rng.random() < 0.5 else bytes(len(part)) for part in self.pending)
        return [whole, self.sure, torn, holes, self.sure + bytes(new)]


@dataclass
class Folder:
    """The names that are sure, the changes of names since the last sync, and the files."""

    sure: dict[str, int] = field(default_factory=dict)
    pending: list[Call] = field(default_factory=list)
    now: dict[str, int] = field(default_factory=dict)
    files: dict[int, File] = field(default_factory=dict)

    def do(self, call: Call) -> None:
        match call.name:
            case "write":
                self.files[call.arguments[0]].pending.append(call.arguments[1])
            case "fsync":
                file = self.files[call.arguments[0]]
                file.sure, file.pending = file.sure + b"".join(file.pending), []
            case "fsync_dir":
                self.sure, self.pending = dict(self.now), []
            case _:
                bound = self._bound(call)
                self.pending.append(bound)
                _rename(self.now, bound)

    def _bound(self, call: Call) -> Call:
        """A change of names with the number of the file it is about, so that it means the same on its own."""
        if call.name == "create":
            self.files[call.arguments[1]] = File()
            return call
        return Call(call.name, (*call.arguments, self.now[call.arguments[0]]))

    def states(self, rng: random.Random, most: int) -> Iterator[dict[str, bytes]]:
        """Names and contents after a power cut now: all of them where there are at most `most`, else that many."""
        choices = list(itertools.product([False, True], repeat=len(self.pending)))
        if len(choices) * 5 > most:
            choices = [choices[0], choices[-1], *rng.sample(choices, max(1, most // 5))]
        for chosen in choices:
            names = dict(self.sure)
            for call in itertools.compress(self.pending, chosen):
                _rename(names, call)
            kinds = {inode: self.files[inode].variants(rng) for inode in sorted(set(names.values()))}
            for turn in range(max(map(len, kinds.values()), default=1)):
                picked = {inode: kind[turn % len(kind)] for inode, kind in kinds.items()}
                yield {name: picked[inode] for name, inode in names.items()}


def _rename(names: dict[str, int], call: Call) -> None:
    """One change of names, whichever of those before it have happened."""
    match call.name:
        case "create":
            names[call.arguments[0]] = call.arguments[1]
        case "rename":
            source, target, inode = call.arguments
            names[target] = inode
            if names.get(source) == inode:
                del names[source]
        case "link":
            names[call.arguments[1]] = call.arguments[2]
        case "unlink":
            names.pop(call.arguments[0], None)


def after_each_call(calls: list[Call], rng: random.Random, most: int) -> Iterator[tuple[int, dict[str, bytes]]]:
    """The number of calls done, and a state that a power cut after them may leave; at most about `most` for each."""
    folder = Folder()
    for done in range(len(calls) + 1):
        for state in deepcopy(folder).states(rng, most):
            yield done, state
        if done < len(calls):
            folder.do(calls[done])


def put(state: dict[str, bytes], folder: Path) -> None:
    """Make the state real in a fresh folder."""
    folder.mkdir()
    for name, content in state.items():
        (folder / name).write_bytes(content)


Judge = Callable[[Path, int], str | None]
