"""A folder of sequences while one `prepare` fills it: alone in it, and of inputs that stay what they were.

A mark is written first and removed last, behind the manifest: what lies beside it is of a call that was killed, and is
made anew. Files of such names without a mark or a manifest are somebody else's.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from protomamba.data.claim import PROGRESS_FILE, PrepareLock, check_unchanged
from protomamba.data.files import FileRef, reference, refuse_repeated, sha256_of
from protomamba.data.manifest import MANIFEST
from protomamba.data.prepared_manifest import TOKENS, VERSION, PreparedManifest, read_prepared_manifest
from protomamba.errors import UserError
from protomamba.storage import make_folder, remove_stale_temporaries, write_json

_ARRAYS = re.compile(r"(spans|vocabulary|train|valid|test)-[a-z]+\.npy")


@dataclass(frozen=True)
class Filling:
    """What a call is to do: `plan`, a checksum of it, and its inputs as the manifest lists them.

    done: the manifest, where the same call has been made before.
    """

    folder: Path
    plan: str
    inputs: Sequence[FileRef]
    done: PreparedManifest | None

    @property
    def listed(self) -> list[dict[str, Any]]:
        """The inputs for the manifest."""
        return _listed(self.inputs)

    def check_inputs(self) -> None:
        """UserError where an input is not what it was at the start: called behind reading, before anything is kept."""
        for file in self.inputs:
            check_unchanged(file.path, file)


@contextlib.contextmanager
def filling(folder: Path, inputs: Sequence[Path], options: Mapping[str, Any]) -> Iterator[Filling]:
    """Holds the folder while it is filled. UserError for a folder in use or of other contents, and where an input
    changed, which then is told instead of whatever was found in it."""
    refuse_repeated(inputs)
    files = [_described(path, folder) for path in inputs]
    make_folder(folder)
    with PrepareLock(folder):
        remove_stale_temporaries(folder, _is_ours)
        plan = _plan(files, options)
        call = Filling(folder, plan, files, _finished(folder, plan))
        if call.done is None:
            _begin(folder, plan)
        try:
            yield call
        except Exception:
            call.check_inputs()
            raise
        (folder / PROGRESS_FILE).unlink(missing_ok=True)


def _described(path: Path, folder: Path) -> FileRef:
    if path.is_dir():
        raise UserError(f"{path}: expected a file, found a folder: name the files in it")
    if path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{path}: is an input and lies in --out-dir {folder}; choose another --out-dir")
    return reference(path)


def _listed(files: Sequence[FileRef]) -> list[dict[str, Any]]:
    return [{"name": file.path.name, "bytes": file.size, "sha256": file.sha256} for file in files]


def _plan(files: Sequence[FileRef], options: Mapping[str, Any]) -> str:
    text = json.dumps([VERSION, _listed(files), options], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _is_ours(name: str) -> bool:
    return name in (MANIFEST, PROGRESS_FILE, TOKENS) or _ARRAYS.fullmatch(name) is not None


def _finished(folder: Path, plan: str) -> PreparedManifest | None:
    """The manifest of the same call; None for a folder to fill. UserError for a folder of other contents."""
    manifest = read_prepared_manifest(folder)
    if manifest is None:
        return None
    if manifest.plan != plan:
        raise UserError(
            f"{folder}: holds {manifest.kind} made from other inputs or with other options; choose an empty --out-dir"
        )
    for name in manifest.files:
        manifest.check(folder / name, sha256_of(folder / name))
    return manifest


def _begin(folder: Path, plan: str) -> None:
    """Mark the folder; what a killed call has left is removed. UserError where there is no mark and yet something."""
    own = [path for path in folder.iterdir() if _is_ours(path.name) and path.name != PROGRESS_FILE]
    killed = (folder / PROGRESS_FILE).is_file() and not (folder / MANIFEST).exists()
    if any(folder.glob("shard-*.bin")) or (own and not killed):
        raise UserError(f"{folder}: holds other data; choose an empty --out-dir")
    for path in own:
        path.unlink()
    write_json(folder / PROGRESS_FILE, {"plan": plan}, sort_keys=True)
