"""A folder that `prepare` made, of any kind: its manifest, and its parts as sources.

Text keeps the manifest of token shards (manifest.py). Events, DNA and labelled sequences have the one below: what the
files are, with checksums; how the inputs were read, so that later ones are read alike (`recipe`); what to train
(`preset`); and what is known of the data (`about`). It is written last: a folder with a manifest is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.arrays import load_npy
from protomamba.data.files import read_json, sha256_of
from protomamba.data.manifest import MANIFEST
from protomamba.errors import MALFORMED, UserError
from protomamba.storage import atomic_file, write_json

FORMAT, VERSION = "protomamba-prepared", 1
PARTS = ("train", "valid", "test")
TOKENS = "tokens.bin"


@dataclass(frozen=True)
class PreparedManifest:
    """The description of a folder of sequences. Equal inputs and options give equal manifests."""

    folder: Path
    kind: str
    preset: str
    plan: str
    recipe: Mapping[str, Any]
    about: Mapping[str, Any]
    source: Mapping[str, Any]
    files: Mapping[str, str] = field(default_factory=dict)  # name -> sha256

    @property
    def path(self) -> Path:
        return self.folder / MANIFEST

    @property
    def notes(self) -> tuple[str, ...]:
        """What `prepare` found that a user should know."""
        return tuple(self.about.get("notes", ()))

    def write(self) -> None:
        """Write it atomically, last of all."""
        body = {key: value for key, value in vars(self).items() if key != "folder"}
        write_json(self.path, {"format": FORMAT, "version": VERSION, **body}, sort_keys=True)

    def array(self, name: str) -> npt.NDArray[Any]:
        """One of the folder's .npy files, checked. UserError if it is not the one that was written."""
        path = self.folder / name
        self.check(path, sha256_of(path))
        return load_npy(path)

    def check(self, path: Path, sha256: str) -> None:
        """UserError unless a file has the listed checksum."""
        expected = self.files.get(path.name)
        if expected != sha256:
            raise UserError(
                f"{path}: damaged or replaced: {MANIFEST} says sha256 {expected}, found {sha256}; copy the file again "
                "or make the folder again"
            )


def read_prepared_manifest(folder: Path) -> PreparedManifest | None:
    """The manifest of a folder of sequences, or None if it has none. UserError if it is damaged or too new."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    body = read_json(path)
    if body.pop("format", None) != FORMAT:
        return None
    if body.pop("version", None) != VERSION:
        raise UserError(f"{path}: written by a newer protomamba; this one reads version {VERSION}")
    try:
        manifest = PreparedManifest(folder, **body)
        _check_kinds(manifest)
    except MALFORMED as error:
        raise damaged(path, error) from error
    return manifest


def damaged(path: Path, error: Exception) -> UserError:
    """What to say of a manifest that is not as `prepare` writes it."""
    reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return UserError(f"{path}: damaged: {reason}; make the folder again")


def _check_kinds(manifest: PreparedManifest) -> None:
    """ValueError naming the first key whose value is of another kind than `prepare` writes."""
    expected = dict.fromkeys(("kind", "preset", "plan"), str) | dict.fromkeys(("recipe", "about", "source"), dict)
    for key, kind in {**expected, "files": dict}.items():
        if not isinstance(value := getattr(manifest, key), kind):
            raise ValueError(f"{key}: expected {'text' if kind is str else 'an object'}, found {str(value)[:40]!r}")
    for name, sha256 in manifest.files.items():
        if Path(name).name != name or not isinstance(sha256, str):
            raise ValueError(f"files: expected names in the folder and checksums, found {name[:40]!r}")
    notes = manifest.about.get("notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise ValueError(f"notes: expected a list of text, found {str(notes)[:40]!r}")


def save_arrays(folder: Path, arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, str]:
    """Write each array as `NAME.npy`; name and checksum of each file."""
    files = {}
    for name, array in arrays.items():
        path = folder / f"{name}.npy"
        with atomic_file(path) as file:
            np.save(file, array, allow_pickle=False)
        files[path.name] = sha256_of(path)
    return files
