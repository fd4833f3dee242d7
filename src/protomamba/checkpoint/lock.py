"""One run per folder."""

from __future__ import annotations

from protomamba.folder_lock import FolderLock


class RunLock(FolderLock):
    """Holds `folder/lock` for the life of a `with` block; a second run is refused, naming the first."""

    holder = "another run"
