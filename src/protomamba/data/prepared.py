"""A prepared folder as the one argument of a run: which data it holds, in which parts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from protomamba.data.manifest import MANIFEST
from protomamba.data.shards import open_token_dir
from protomamba.data.source import Source
from protomamba.errors import UserError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Prepared:
    """The parts of a prepared folder: `training`, and by name those that `prepare` has set aside (valid, test)."""

    training: Source
    held_out: Mapping[str, Source] = field(default_factory=dict)


def open_prepared(folder: Path) -> Prepared:
    """Open a folder that `protomamba prepare` made. UserError where it is not one, or is damaged."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder; protomamba prepare makes one from your files")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: has no {MANIFEST}, so it is no prepared folder: make one with protomamba prepare, or give "
            f"token files with --token-dir {folder}"
        )
    return Prepared(open_token_dir(folder, "bin"))
