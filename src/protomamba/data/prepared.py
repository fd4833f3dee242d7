"""A prepared folder as the one argument of a run: which data it holds, in which parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.dna import DnaTokenizer
from protomamba.data.labels import from_arrays
from protomamba.data.manifest import MANIFEST
from protomamba.data.prepared_manifest import PARTS, TOKENS, PreparedManifest, damaged, read_prepared_manifest
from protomamba.data.sequences import SequenceSet
from protomamba.data.shards import ShardSet, open_token_dir, open_token_file
from protomamba.data.source import DataInfo, Source
from protomamba.data.tokenizer import ByteTokenizer
from protomamba.data.vocabulary import RESERVED, Vocabulary
from protomamba.errors import MALFORMED, UserError


@dataclass(frozen=True)
class Prepared:
    """The parts of a prepared folder: `training`, and by name those that `prepare` has set aside (valid, test).

    Without a valid part, `training.split` holds some out. The names of items travel in checkpoints as `vocabulary`.
    """

    training: Source
    held_out: Mapping[str, Source] = field(default_factory=dict)
    vocabulary: Vocabulary | None = None

    def part(self, name: str) -> Source:
        """A part by its name. UserError naming those there are."""
        parts = {"train": self.training, **self.held_out}
        if name not in parts:
            raise UserError(f"the data has no {name} part, only {', '.join(parts)}")
        return parts[name]


def open_prepared(folder: Path) -> Prepared:
    """Open a folder that `protomamba prepare` made. UserError where it is not one, or is damaged."""
    if not folder.is_dir():
        found = "is a file, not a prepared folder" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {found}; protomamba prepare makes one from your files")
    if not (folder / MANIFEST).is_file():
        raise UserError(
            f"{folder}: has no {MANIFEST}, so it is not a prepared folder: make one with protomamba prepare, or give "
            f"token files with --token-dir {folder}"
        )
    manifest = read_prepared_manifest(folder)
    if manifest is None:
        return Prepared(open_token_dir(folder, "bin"))
    if manifest.kind not in _OPENERS:
        raise UserError(f"{manifest.path}: damaged: unknown kind {manifest.kind!r}; make the folder again")
    try:
        return _OPENERS[manifest.kind](manifest)
    except MALFORMED as error:
        raise damaged(manifest.path, error) from error


def read_vocabulary(manifest: PreparedManifest) -> Vocabulary:
    """The names of the tokens of a folder."""
    state = {key: manifest.array(f"vocabulary-{key}.npy") for key in ("names", "offsets", "integers")}
    return Vocabulary.from_state(state, str(manifest.folder))


def _open_events(manifest: PreparedManifest) -> Prepared:
    vocabulary = read_vocabulary(manifest)
    about = DataInfo(
        vocab_size=vocabulary.size,
        reset=True,
        reserved=tuple(range(RESERVED)),
        preset=manifest.preset,
        recipe=manifest.recipe,
    )
    whole = SequenceSet(
        _checked_tokens(manifest),
        np.empty((0, 3), dtype=np.int64),
        about,
        vocabulary=vocabulary,
        split_by=str(manifest.about["split"]),
        notes=manifest.notes,
    )
    spans = {name: _spans(manifest, name, whole.store) for name in PARTS}
    parts = {name: whole.part(each, name) for name, each in spans.items() if len(each)}
    return Prepared(parts.pop("train"), parts, vocabulary)


def _open_fasta(manifest: PreparedManifest) -> Prepared:
    tokenizer = DnaTokenizer(int(manifest.recipe["kmer"]), bool(manifest.recipe["keep_case"]))
    about = DataInfo(
        vocab_size=tokenizer.vocab_size,
        eos_token=tokenizer.eos_token,
        reset=True,
        reserved=tuple(range(RESERVED)),
        tokenizer=tokenizer.to_json(),
        preset=manifest.preset,
        bytes_per_token=float(tokenizer.k),
        raw_unit=tokenizer.raw_unit,
        recipe=manifest.recipe,
    )
    complement = tokenizer.complement() if manifest.about["both_strands"] else None
    tokens = _checked_tokens(manifest)
    spans = _spans(manifest, "train", tokens)
    return Prepared(SequenceSet(tokens, spans, about, complement=complement, notes=manifest.notes))


def _open_labels(manifest: PreparedManifest) -> Prepared:
    known, recipe = manifest.about, manifest.recipe
    vocabulary = read_vocabulary(manifest) if recipe["tokens"] else None
    about = DataInfo(
        input=known["input"],
        vocab_size=int(known["vocab_size"]),
        channels=int(known.get("channels", 0)),
        n_class=len(known["classes"]),
        class_names=tuple(known["classes"]),
        tokenizer=known.get("tokenizer", ByteTokenizer(None).to_json()) if recipe["text"] else None,
        preset=manifest.preset,
        recipe=recipe,
    )
    _check_about(known)
    parts = {}
    for name in known["parts"]:
        values, lengths, labels = (manifest.array(f"{name}-{what}.npy") for what in ("values", "lengths", "labels"))
        if not (lengths.shape == labels.shape and lengths.sum() == len(values) and (lengths > 0).all()):
            raise ValueError(f"{name}: the lengths of its sequences do not fit its values")
        parts[name] = from_arrays(manifest.folder, name, (values, lengths, labels), about, manifest.notes)
    return Prepared(parts.pop("train"), parts, vocabulary)


def _check_about(known: Mapping[str, Any]) -> None:
    """ValueError unless what a model is made by is what `prepare` writes."""
    classes = known["classes"]
    sound = isinstance(classes, list) and classes and all(isinstance(each, str) for each in classes)
    if not sound or known["input"] not in ("tokens", "vector") or not isinstance(known["parts"], dict):
        raise ValueError("expected parts, names of classes, and an input of tokens or vector")


def _spans(manifest: PreparedManifest, part: str, store: ShardSet) -> npt.NDArray[np.int64]:
    """First token, first target and end of each sequence of a part. ValueError for what lies outside of the tokens."""
    spans, tokens = manifest.array(f"spans-{part}.npy"), store.shards[0].tokens
    if spans.ndim != 2 or spans.shape[1] != 3 or spans.dtype.kind not in "iu":
        raise ValueError(f"spans-{part}.npy: expected integers N x 3, found {spans.dtype} of shape {spans.shape}")
    if spans.size and (spans.min() < 0 or spans.max() > tokens or (np.diff(spans, axis=1) < 0).any()):
        raise ValueError(f"spans-{part}.npy: expected rising places from 0 to {tokens:,}")
    return spans.astype(np.int64, copy=False)


def _checked_tokens(manifest: PreparedManifest) -> ShardSet:
    shards = open_token_file(manifest.folder / TOKENS)
    manifest.check(manifest.folder / TOKENS, shards.shards[0].indexed.source.sha256)
    return shards


_OPENERS: dict[str, Callable[[PreparedManifest], Prepared]] = {
    "events": _open_events,
    "fasta": _open_fasta,
    "labels": _open_labels,
}
