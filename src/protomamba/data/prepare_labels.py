"""`prepare labels`: sequences of text, tokens or real values with a label each, to arrays held in memory.

Real values are standardised channel by channel by the training part; the recipe says how, for later inputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.files import sha256_of
from protomamba.data.filling import Filling, filling
from protomamba.data.labelled_tables import Example, LabelColumns, Names, read_examples
from protomamba.data.prepared_manifest import PreparedManifest, save_arrays
from protomamba.data.tokenizer import ByteTokenizer, Tokenizer, load_tokenizer, train_bpe_tokenizer, with_eos
from protomamba.data.vocabulary import RESERVED, Vocabulary
from protomamba.errors import ConfigError, UserError
from protomamba.words import counted

MANY_CLASSES = 20


def prepare_labels(
    inputs: Sequence[str | Path],
    out_dir: str | Path,
    columns: LabelColumns,
    *,
    valid: Sequence[str | Path] = (),
    test: Sequence[str | Path] = (),
    tokenizer: str = "bytes",
    train_bpe: int | None = None,
) -> PreparedManifest:
    """Make a folder of labelled sequences; returns the manifest that is also written.

    `valid` and `test` name the files of these parts. Texts become tokens by `tokenizer`, `bytes` or the path of a
    `tokenizer.json`, or by one of `train_bpe` tokens that is made of the training part. UserError naming file, row and
    column of what cannot be read, and of a label that training has none of.
    """
    columns.check()
    by = _tokens_by(columns, tokenizer, train_bpe)
    files = {"train": inputs, "valid": valid, "test": test}
    paths = {name: [Path(each) for each in given] for name, given in files.items() if given}
    everything, folder = [path for each in paths.values() for path in each], Path(out_dir)
    counts = {name: len(each) for name, each in paths.items()}
    with filling(folder, everything, {"labels": asdict(columns), "parts": counts, **by}) as call:
        return call.done or _fill(call, paths, columns, tokenizer, train_bpe)


def _tokens_by(columns: LabelColumns, tokenizer: str, train_bpe: int | None) -> dict[str, Any]:
    """What the plan says of the tokens of texts that are not bytes. ConfigError for what does not go together."""
    if train_bpe is None and tokenizer == "bytes":
        return {}
    if not columns.text:
        raise ConfigError("--tokenizer and --train-bpe make tokens of --text COLUMN: name it, or leave them out")
    return {"tokenizer": f"bpe {train_bpe}" if train_bpe else sha256_of(Path(tokenizer))}


def _fill(
    call: Filling,
    paths: Mapping[str, Sequence[Path]],
    columns: LabelColumns,
    tokenizer: str,
    train_bpe: int | None,
) -> PreparedManifest:
    names = Names()
    parts: dict[str, _Part] = {}
    classes: list[str] = []
    encoder: Tokenizer | None = None
    for name, chosen in paths.items():
        examples = list(read_examples(chosen, columns, names))
        if not examples:
            raise UserError(f"{chosen[0]}: expected labelled sequences, found none")
        if columns.text:
            encoder = encoder or _encoder(examples, tokenizer, train_bpe)
            examples = _encoded(examples, encoder)
        classes = classes or _classes(examples)
        parts[name] = _Part.of(examples, classes, columns, next(iter(parts.values()), None))
        names.open = False
    call.check_inputs()
    return _write(call, columns, parts, classes, names, encoder)


def _encoder(examples: Sequence[Example], tokenizer: str, train_bpe: int | None) -> Tokenizer:
    """What makes tokens of the texts, which are bytes so far; a sequence has no end of document."""
    if train_bpe:
        return with_eos(train_bpe_tokenizer(map(_text, examples), train_bpe), "none", "--train-bpe")
    return ByteTokenizer(None) if tokenizer == "bytes" else load_tokenizer(tokenizer, "none")


def _encoded(examples: list[Example], encoder: Tokenizer) -> list[Example]:
    if isinstance(encoder, ByteTokenizer):
        return examples
    tokens = encoder.encode_batch([_text(example) for example in examples])
    return [replace(example, steps=np.array(each, np.int64)) for example, each in zip(examples, tokens, strict=True)]


def _text(example: Example) -> str:
    return example.steps.astype(np.uint8).tobytes().decode("utf-8", "replace")


def _classes(examples: Sequence[Example]) -> list[str]:
    """The names of the classes: numbers by size, others by the alphabet."""
    found = {example.label for example in examples}
    if len(found) == len(examples) > MANY_CLASSES:
        first = examples[0]
        raise UserError(
            f"{first.where}: expected labels that several sequences share, found {len(found):,} different ones for as "
            f"many sequences, such as {first.label!r}: is it another column? Numbers to be estimated are not classes"
        )
    if len(found) < 2:
        raise UserError(f"{examples[0].where}: expected at least two classes, found only {examples[0].label!r}")
    try:
        return sorted(found, key=float)
    except ValueError:
        return sorted(found)


@dataclass(frozen=True)
class _Part:
    """The steps of all sequences of a part one after the other, how many each has, and its class."""

    values: npt.NDArray[Any]
    lengths: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]

    @classmethod
    def of(
        cls, examples: Sequence[Example], classes: Sequence[str], columns: LabelColumns, like: _Part | None
    ) -> _Part:
        """UserError for an empty sequence, another number of channels, or a label that is no class."""
        number = {name: place for place, name in enumerate(classes)}
        shape = like.values.shape[1:] if like else examples[0].steps.shape[1:]
        for each in examples:
            column = f", column {columns.label!r}" if columns.label else ""
            if not len(each.steps):
                raise UserError(f"{each.where}: expected a sequence of at least one step, found an empty one")
            if each.label not in number:
                known = ", ".join(classes[:10]) + (", ..." if len(classes) > 10 else "")
                raise UserError(
                    f"{each.where}{column}: expected a label that training has ({known}), found {each.label!r}"
                )
            if each.steps.shape[1:] != shape:
                found = " ".join(map(str, each.steps.shape[1:])) or "tokens"
                expected = " ".join(map(str, shape)) or "tokens"
                raise UserError(f"{each.where}: expected {expected} channels as in the first sequence, found {found}")
        labels = np.array([number[each.label] for each in examples], dtype=np.int32)
        lengths = np.array([len(each.steps) for each in examples], dtype=np.int64)
        return cls(np.concatenate([each.steps for each in examples]), lengths, labels)


def _write(
    call: Filling,
    columns: LabelColumns,
    parts: Mapping[str, _Part],
    classes: Sequence[str],
    names: Names,
    encoder: Tokenizer | None,
) -> PreparedManifest:
    train, about = parts["train"], dict[str, Any]()
    recipe: dict[str, Any] = {"kind": "labels", **asdict(columns)}
    arrays: dict[str, npt.NDArray[Any]] = {}
    values = {name: part.values for name, part in parts.items()}
    if train.values.ndim == 2:
        mean, std = _scale(train.values)
        values = {name: ((each - mean) / std).astype(np.float32) for name, each in values.items()}
        recipe |= {"mean": mean.tolist(), "std": std.tolist()}
        about = {"input": "vector", "vocab_size": 0, "channels": train.values.shape[1]}
    elif encoder is not None:
        about = {"input": "tokens", "vocab_size": encoder.vocab_size, "tokenizer": encoder.to_json()}
    else:
        vocabulary = Vocabulary.of(names.numbers)
        arrays |= {f"vocabulary-{key}": value for key, value in vocabulary.state().items()}
        about = {"input": "tokens", "vocab_size": len(names.numbers) + RESERVED}
    for name, part in parts.items():
        arrays |= {f"{name}-values": values[name], f"{name}-lengths": part.lengths, f"{name}-labels": part.labels}
    manifest = PreparedManifest(
        call.folder,
        kind="labels",
        preset="classify",
        plan=call.plan,
        recipe=recipe,
        about={
            **about,
            "classes": list(classes),
            "class_counts": np.bincount(train.labels, minlength=len(classes)).tolist(),
            "parts": {
                name: {"sequences": len(part.labels), "targets": len(part.labels)} for name, part in parts.items()
            },
            "notes": _notes(train, classes),
        },
        source={"inputs": call.listed},
        files=save_arrays(call.folder, arrays),
    )
    manifest.write()
    return manifest


def _scale(values: npt.NDArray[Any]) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Mean and deviation of each channel over what is known; a channel that is constant or unknown is left as it is."""
    known = ~np.isnan(values)
    count = np.maximum(known.sum(axis=0), 1)
    filled = np.where(known, values, 0).astype(np.float64)
    mean = filled.sum(axis=0) / count
    std = np.sqrt((np.where(known, filled - mean, 0) ** 2).sum(axis=0) / count)
    return mean, np.where(std > 1e-12, std, 1.0)


def _notes(train: _Part, classes: Sequence[str]) -> list[str]:
    counts = np.bincount(train.labels, minlength=len(classes))
    notes = []
    if train.values.ndim == 2 and (missing := float(np.isnan(train.values).mean())):
        notes.append(f"{missing:.1%} of the values are missing; the model sees which")
    if counts.max() >= 3 * counts.min():
        rare = classes[int(counts.argmin())]
        notes.append(
            f"class {rare!r} has {counted(counts.min(), 'sequence')} and the most common {counts.max():,}: "
            "--class-weights balanced gives every class the same total weight"
        )
    return notes
