"""The interface of data for a run: batches that are functions of their index, and what a model must know.

A source of your own needs no base class, only these members. The batches of the sources here are pure
functions of (seed, epoch, index).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

import numpy as np
import numpy.typing as npt

from protomamba.data.stream import BatchStream, Identity
from protomamba.data.windows import Batch


@dataclass(frozen=True)
class StreamSpec:
    """How a run cuts its data into batches; `packed`, `shuffle_shards` and the reset concern token shards alone."""

    batch_size: int
    seq_len: int
    seed: int = 0
    packed: bool = True
    shuffle_shards: bool = True
    eos_token: int | None = None
    reset_at_eos: bool = False


@dataclass(frozen=True)
class DataInfo:
    """What a model and a run must know about their data.

    `tokens` are int64 (B, L) below `vocab_size`; a `vector` is float32 (B, L, channels) with NaN where a value is
    missing. Without `n_class` the target is the next token. `reserved` tokens are never a target: no prediction may
    offer them. `longest` is the longest sequence in steps and `usual` what nineteen of twenty stay within, None where
    windows are cut out of one stream; `targets` is how many an epoch has, where that is known. `reset`: rows hold
    several sequences, and their batches say where each begins. `bytes_per_token` is of the raw text, for bits per byte;
    None where there was none.
    """

    input: Literal["tokens", "vector"] = "tokens"
    vocab_size: int = 0
    channels: int = 0
    n_class: int | None = None
    class_names: tuple[str, ...] = ()
    eos_token: int | None = None
    reset: bool = False
    reserved: tuple[int, ...] = ()
    longest: int | None = None
    usual: int | None = None
    targets: int | None = None
    tokenizer: str | None = None  # as JSON, for tokenizer_from_json
    preset: str | None = None  # bytes, text, events, dna or classify, where `prepare` said so
    bytes_per_token: float | None = None
    raw_unit: str = "byte"  # what bytes_per_token counts: of DNA bases
    recipe: Mapping[str, Any] | None = None  # how `prepare` read its inputs, so that later ones are read alike


class Source(Protocol):
    """Data of one kind, or a part of it."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Lines that the user should see."""

    @property
    def info(self) -> DataInfo:
        """What a model and a run must know."""

    def identity(self) -> Identity:
        """Name, range and checksum of every file, in order: equal identities are equal data."""

    def check(self, *, vocab_size: int, classes: int, seq_len: int) -> None:
        """UserError naming file and place of the first token, label or length that does not fit."""

    def class_counts(self) -> npt.NDArray[np.int64] | None:
        """How often each class is a target in all of it; None where counting would mean reading everything."""

    def split(self, ratio: float, seed: int) -> tuple[Self, Self]:
        """Training and held-out part, without a target in common. UserError where that is not possible."""

    def stream(self, spec: StreamSpec) -> BatchStream:
        """The endless training stream."""

    def eval_batches(self, spec: StreamSpec, count: int | None = None) -> Iterator[Batch]:
        """The same batches every time, spread evenly over all of it: `count` of them, None for every target."""
