"""One `prepare` per folder, and inputs that stay what they were while it reads them."""

from __future__ import annotations

from pathlib import Path

from protomamba.data.files import FileRef, check_regular_file
from protomamba.errors import UserError
from protomamba.folder_lock import FolderLock

# Marks a folder that a `prepare` has begun and not finished.
PROGRESS_FILE = "prepare-progress.json"


class PrepareLock(FolderLock):
    """Holds a folder of shards while they are made; its file is hidden, and no shard."""

    name = ".prepare.lock"
    holder = "another prepare"


def check_unchanged(path: Path, file: FileRef) -> None:
    """UserError unless `path` still has the size and times with which its contents were summed up.

    Called after a part was read and before anything of it is kept, it vouches for that part.
    """
    if not file.same_stamp(check_regular_file(path)):
        raise UserError(
            f"{path}: changed while it was read (expected {file.size:,} bytes, as at the start):"
            " start again when nothing writes to it"
        )
