"""From the data flags of a run to what it trains on: token sets, vocabulary, stream, fixed validation windows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from protomamba.config import RunConfig
from protomamba.data.corpus import default_corpus
from protomamba.data.shards import ShardSet, infer_vocab, open_token_dir, open_token_file
from protomamba.data.stream import TokenStream
from protomamba.data.tokenizer import TOKENIZER_FILE
from protomamba.data.windows import Batch, eval_batches
from protomamba.errors import ConfigError, UserError


@dataclass(frozen=True)
class Inputs:
    """What a run trains on and is validated on; `validation` is None where nothing is held out."""

    training: ShardSet
    validation: ShardSet | None
    vocab_size: int
    tokenizer: str | None  # as JSON, for data.tokenizer_from_json

    @property
    def notes(self) -> list[str]:
        """What the readers of the data want the user to know."""
        return [*self.training.notes, *(self.validation.notes if self.validation else ())]


def open_inputs(config: RunConfig) -> Inputs:
    """Open, index and check the data of a run. Raises UserError naming the file and what is wrong with it."""
    training = _open(config.token_file, config.token_dir, "--token", config.shard_ext)
    training = training or default_corpus(config.out_dir / "corpus")
    tokenizer = _tokenizer_json(training)
    validation = _open(config.val_token_file, config.val_token_dir, "--val-token", config.shard_ext)
    if validation is None and config.val_ratio > 0:
        training, validation = training.split(config.val_ratio)
    vocab_size = config.vocab_size or infer_vocab(training, *([validation] if validation else []))
    for shards in filter(None, (training, validation)):
        shards.check_vocab(vocab_size)
    if config.eos_token is not None and config.eos_token >= vocab_size:
        raise ConfigError(f"--eos-token {config.eos_token}: expected a token below the vocabulary size {vocab_size}")
    return Inputs(training, validation, vocab_size, tokenizer)


def _open(file: Path | None, folder: Path | None, prefix: str, ext: str) -> ShardSet | None:
    if file and folder:
        raise ConfigError(f"{prefix}-file and {prefix}-dir exclude each other: give one of them")
    if file:
        return open_token_file(file)
    return open_token_dir(folder, ext) if folder else None


def _tokenizer_json(shards: ShardSet) -> str | None:
    """The tokenizer that made the tokens, carried along unread: training does not need the library behind it."""
    manifest = shards.manifest
    if manifest is None or not manifest.tokenizer.get("kind"):
        return None
    description = {"kind": manifest.tokenizer["kind"], "eos": manifest.eos_token}
    if (path := manifest.folder / TOKENIZER_FILE).is_file():
        description["tokenizer"] = path.read_text(encoding="utf-8")
    return json.dumps(description)


def training_stream(inputs: Inputs, config: RunConfig) -> TokenStream:
    """The order of training windows; raises ConfigError for --reset-at-eos without --eos-token."""
    if config.reset_at_eos and config.eos_token is None:
        raise ConfigError("--reset-at-eos 1 needs --eos-token ID")
    return TokenStream(
        inputs.training,
        batch_size=config.batch_size,
        seq_len=config.seq_len,
        seed=config.seed,
        packed=config.packed_sequences,
        shuffle_shards=config.shuffle_shards,
        eos_token=config.eos_token,
        reset_at_eos=config.reset_at_eos,
    )


def validation_windows(shards: ShardSet, config: RunConfig, count: int | None) -> Iterator[Batch]:
    """The same windows each time, spread over the set; `count` batches, None for all."""
    return eval_batches(
        shards,
        config.batch_size,
        config.seq_len,
        count,
        eos_token=config.eos_token,
        reset_at_eos=config.reset_at_eos,
    )


def majority_share(targets: list[Tensor]) -> float:
    """The share of the commonest target: the accuracy of always guessing it."""
    valid = torch.cat([t[t >= 0].flatten() for t in targets])
    if not valid.numel():
        raise UserError("the validation windows hold no target")
    return float(torch.bincount(valid).max()) / valid.numel()
