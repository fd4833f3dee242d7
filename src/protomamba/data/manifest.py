"""`manifest.json` of a folder of shards: what belongs in the folder, its checksums, vocabulary and tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from protomamba.data.files import check_kinds, read_json
from protomamba.data.tokenizer import TOKENIZER_FILE
from protomamba.errors import MALFORMED, UserError
from protomamba.storage import write_json

MANIFEST = "manifest.json"
FORMAT = "protomamba-shards"
VERSION = 1


LONGEST_NAME = 255  # bytes; of the common file systems


@dataclass(frozen=True)
class ShardEntry:
    """One shard as it was written."""

    name: str
    tokens: int
    bytes: int
    max_token: int
    sha256: str

    def __post_init__(self) -> None:
        check_kinds(self)
        name = self.name
        if name in ("", ".", "..") or "/" in name or "\0" in name or len(os.fsencode(name)) > LONGEST_NAME:
            raise ValueError(f"shard {name[:80]!r}: expected the name of a file in this folder")


@dataclass(frozen=True)
class Manifest:
    """The description of a prepared folder.

    `tokenizer` is {"kind": "bytes" or "huggingface", "identity": checksum}; its file, if any, is `tokenizer.json`
    beside. `source` says what the tokens were made of, `preset` what to train on them, `raw_bytes` is the length of
    the text itself. Equal inputs give equal manifests: there is no date in it.
    """

    folder: Path
    dtype: str
    vocab_size: int
    eos_token: int | None
    tokenizer: Mapping[str, Any]
    source: Mapping[str, Any]
    shards: Sequence[ShardEntry]
    preset: str | None = None
    raw_bytes: int | None = None

    @property
    def path(self) -> Path:
        """Where it is, or will be, written."""
        return self.folder / MANIFEST

    @property
    def tokens(self) -> int:
        """Tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the raw text; the end of a document counts as a token, not as a byte."""
        return None if self.raw_bytes is None else self.raw_bytes / self.tokens

    def tokenizer_json(self) -> str | None:
        """The tokenizer for `tokenizer_from_json`, carried unread: training does not need the library behind it."""
        if not self.tokenizer.get("kind"):
            return None
        description = {"kind": self.tokenizer["kind"], "eos": self.eos_token}
        if (path := self.folder / TOKENIZER_FILE).is_file():
            description["tokenizer"] = path.read_text(encoding="utf-8")
        return json.dumps(description)

    def write(self) -> None:
        """Write it atomically, last of all: a folder with a manifest is complete."""
        body = {key: value for key, value in vars(self).items() if key != "folder"}
        body["shards"] = [asdict(shard) for shard in self.shards]
        write_json(self.path, {"format": FORMAT, "version": VERSION, "tokens": self.tokens, **body}, sort_keys=True)

    def check_names(self, names: set[str]) -> None:
        """UserError unless the folder holds just the shards that are listed."""
        listed = {shard.name for shard in self.shards}
        if listed != names:
            odd = min(listed ^ names)
            state = "is listed but missing" if odd in listed else "is not listed"
            raise UserError(f"{self.path}: shard {odd} {state}; put back what belongs there or make the folder again")

    def check_shard(self, path: Path, tokens: int, sha256: str) -> None:
        """UserError if a shard is not the one that was written."""
        entry = next(shard for shard in self.shards if shard.name == path.name)
        for what, expected, found in (("tokens", entry.tokens, tokens), ("sha256", entry.sha256, sha256)):
            if expected != found:
                raise UserError(
                    f"{path}: damaged or replaced: {MANIFEST} says {what} {expected}, found {found}; "
                    "copy the shard again or make the folder again"
                )


def _kind_or_none(body: Mapping[str, Any], key: str, kind: type) -> Any:
    value = body.get(key)
    if value is not None and type(value) is not kind:
        raise TypeError(f"{key}: expected {kind.__name__}, found {str(value)[:40]}")
    return value


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a folder, or None if it has none of ours. UserError if it is damaged or of a newer version."""
    path = folder / MANIFEST
    if not path.is_file():
        return None
    body = read_json(path)
    if body.pop("format", None) != FORMAT:
        return None  # another program's file of the same name
    if body.get("version") != VERSION:
        raise UserError(f"{path}: version {body.get('version')!r}; this protomamba reads version {VERSION}")
    try:
        shards = tuple(ShardEntry(**entry) for entry in body["shards"])
        manifest = Manifest(
            folder,
            str(body["dtype"]),
            int(body["vocab_size"]),
            None if body["eos_token"] is None else int(body["eos_token"]),
            dict(body["tokenizer"]),
            dict(body["source"]),
            shards,
            _kind_or_none(body, "preset", str),
            _kind_or_none(body, "raw_bytes", int),
        )
    except MALFORMED as error:
        raise UserError(f"{path}: damaged: {type(error).__name__}: {error}; make the folder again") from error
    if manifest.tokens != body.get("tokens"):
        raise UserError(f"{path}: damaged: its shards add up to {manifest.tokens} tokens, not {body.get('tokens')}")
    return manifest
