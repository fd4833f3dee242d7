"""What a reader under test is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.reliability.fuzz.mutate import Mutator


@dataclass(frozen=True)
class Reader:
    """`make` writes a good input below a folder and returns the file to be mutated; `read` reads the whole of it.

    `foreign`: the bytes are parsed by another project's native code, which may take the process with it.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], Any]
    mutate: Mutator
    foreign: bool = False


def file_of(name: str, content: bytes) -> Callable[[Path], Path]:
    """A maker of one file."""

    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content)
        return folder / name

    return make
