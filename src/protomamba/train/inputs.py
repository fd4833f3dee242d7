"""From the data flags of a run to what it trains on: token sets, vocabulary, stream, fixed validation windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomamba.data.corpus import default_corpus
from protomamba.data.labels import LabelledSequences, open_labelled
from protomamba.data.prepared import open_prepared
from protomamba.data.shards import ShardSet, infer_vocab, open_token_dir, open_token_file
from protomamba.data.source import Source, StreamSpec
from protomamba.data.vocabulary import Vocabulary
from protomamba.data.windows import Batch
from protomamba.errors import ConfigError
from protomamba.run_config import DataFields
from protomamba.schema import flag


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and is validated on; `validation` is None where nothing is held out."""

    training: Source
    validation: Source | None
    vocab_size: int
    tokenizer: str | None = None  # as JSON, for data.tokenizer_from_json
    n_class: int | None = None  # with labels; None where the next token is the target
    eos_token: int | None = None
    vocabulary: Vocabulary | None = None  # names of items

    @property
    def record(self) -> dict[str, Any]:
        """What a checkpoint says of its data, so that later inputs are read alike and answers get their names."""
        info = self.training.info
        return {
            "preset": info.preset,
            "recipe": dict(info.recipe) if info.recipe else None,
            "reserved": list(info.reserved),
            "class_names": list(info.class_names),
        }

    @property
    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """The parts of a checkpoint that the data gives: the names of items, too many for its header."""
        if self.vocabulary is None:
            return {}
        state = self.vocabulary.state()
        return {"vocabulary": {name: torch.from_numpy(array.copy()) for name, array in state.items()}}

    @property
    def notes(self) -> list[str]:
        """What the readers of the data want the user to know."""
        return list(dict.fromkeys([*self.training.notes, *(self.validation.notes if self.validation else ())]))

    def check(self, seq_len: int) -> None:
        """UserError naming file and place of the first token, label or length that does not fit."""
        for source in filter(None, (self.training, self.validation)):
            source.check(vocab_size=self.vocab_size, classes=self.n_class or self.vocab_size, seq_len=seq_len)

    @property
    def decided(self) -> dict[str, Any]:
        """The fields of a run's configuration that the data decides."""
        fields = {"vocab_size": self.vocab_size, "n_class": self.n_class, "eos_token": self.eos_token}
        channels = self.training.info.channels
        return {**fields, "input": "vector", "input_options": {"channels": channels}} if channels else fields


@dataclass(frozen=True)
class Held:
    """The validation batches of a run: the same ones each time they are iterated, `count` of them, None for all."""

    source: Source
    spec: StreamSpec
    count: int | None

    def __iter__(self) -> Iterator[Batch]:
        return self.source.eval_batches(self.spec, self.count)

    @property
    def bytes_per_token(self) -> float | None:
        """Of the raw text, where text was prepared."""
        return self.source.info.bytes_per_token

    @property
    def raw_unit(self) -> str:
        """What that counts: a byte, or a base of DNA."""
        return self.source.info.raw_unit


def open_inputs(config: DataFields, *, seed: int, corpus: Path) -> Inputs:
    """Open, index and check the data of a run. Raises UserError naming the file and what is wrong with it.

    seed: of the drawing of held-out sequences. corpus: where the default corpus is built if no tokens are named.
    """
    if config.data:
        return _open_prepared(config, config.data, seed)
    if config.label_file or config.val_label_file or config.n_class:
        return _open_labelled(config, seed)
    training = _open(config.token_file, config.token_dir, "--token", config.shard_ext)
    training = training or default_corpus(corpus)
    tokenizer = training.info.tokenizer
    validation = _open(config.val_token_file, config.val_token_dir, "--val-token", config.shard_ext)
    if validation is None and config.val_ratio > 0:
        training, validation = training.split(config.val_ratio, seed)
    vocab_size = config.vocab_size or infer_vocab(training, *([validation] if validation else []))
    if config.eos_token is not None and config.eos_token >= vocab_size:
        raise ConfigError(f"--eos-token {config.eos_token}: expected a token below the vocabulary size {vocab_size}")
    return Inputs(training, validation, vocab_size, tokenizer, eos_token=_eos_token(config, training))


def _open_prepared(config: DataFields, folder: Path, seed: int) -> Inputs:
    """The one argument DATA: what `prepare` wrote, and what it set aside."""
    others = ("token_file", "token_dir", "val_token_file", "val_token_dir", "label_file", "val_label_file")
    if clash := [flag(name) for name in others if getattr(config, name)]:
        raise ConfigError(f"DATA ({folder}) and {', '.join(clash)} exclude each other: give one of them")
    prepared = open_prepared(folder)
    training, validation = prepared.training, prepared.held_out.get("valid")
    if validation is None and config.val_ratio > 0:
        training, validation = training.split(config.val_ratio, seed)
    info = training.info
    vocab_size = config.vocab_size or max(1, info.vocab_size)
    eos_token = config.eos_token if config.eos_token is not None else info.eos_token
    return Inputs(
        training,
        validation,
        vocab_size,
        info.tokenizer,
        n_class=info.n_class,
        eos_token=eos_token,
        vocabulary=prepared.vocabulary,
    )


def _eos_token(config: DataFields, shards: ShardSet) -> int | None:
    """--eos-token, or, where the state is to stop at it, what `prepare` wrote into the folder's manifest."""
    if config.eos_token is not None or not config.reset_at_eos:
        return config.eos_token
    if shards.manifest is None or shards.manifest.eos_token is None:
        raise ConfigError("--reset-at-eos 1 needs --eos-token ID: the data has no manifest that names the token")
    return shards.manifest.eos_token


def _open_labelled(config: DataFields, seed: int) -> Inputs:
    """Sequences with their labels: of the run, held out, and how many tokens and classes there are."""
    if not (config.token_file and config.label_file):
        raise ConfigError("--label-file, --val-label-file and --n-class go with --token-file and --label-file together")
    if config.token_dir or config.val_token_dir or config.reset_at_eos:
        raise ConfigError(
            "--label-file takes its sequences, a line each, from --token-file and --val-token-file: leave out "
            "--token-dir, --val-token-dir and --reset-at-eos"
        )
    if bool(config.val_token_file) != bool(config.val_label_file):
        raise ConfigError("--val-token-file and --val-label-file go together: give both or none")
    training = open_labelled(config.token_file, config.label_file)
    validation: LabelledSequences | None = None
    if config.val_token_file and config.val_label_file:
        validation = open_labelled(config.val_token_file, config.val_label_file)
    elif config.val_ratio > 0:
        training, validation = training.split(config.val_ratio, seed)
    sets = [each for each in (training, validation) if each is not None]
    vocab_size = config.vocab_size or 1 + max(each.max_token for each in sets)
    n_class = config.n_class or 1 + max(each.max_label for each in sets)
    return Inputs(training, validation, vocab_size, n_class=n_class, eos_token=config.eos_token)


def _open(file: Path | None, folder: Path | None, prefix: str, ext: str) -> ShardSet | None:
    if file and folder:
        raise ConfigError(f"{prefix}-file and {prefix}-dir exclude each other: give one of them")
    if file:
        return open_token_file(file)
    return open_token_dir(folder, ext) if folder else None


def stream_spec(config: DataFields, seed: int) -> StreamSpec:
    """How the run cuts its data."""
    return StreamSpec(
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=seed,
        packed=config.packed_sequences,
        shuffle_shards=config.shuffle_shards,
        eos_token=config.eos_token,
        reset_at_eos=config.reset_at_eos,
    )
