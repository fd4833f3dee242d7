"""Text to tokens and back: bytes, which need nothing, and Hugging Face `tokenizers` files, an optional extra.

A tokenizer is carried as JSON, in prepared folders and in checkpoints, so that `generate` speaks text by itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

from protomamba.data.dna import DnaTokenizer
from protomamba.data.files import os_message
from protomamba.errors import MALFORMED, ConfigError, UserError

BYTES_EOS = 256
TOKENIZER_FILE = "tokenizer.json"
# Names that published tokenizers give to the token that ends a document, in the order they are looked for.
EOS_NAMES = ("<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]")


class Tokenizer(Protocol):
    """What `prepare`, `generate` and checkpoints need of a tokenizer."""

    @property
    def kind(self) -> str:
        """Which class reads it back: "bytes", "huggingface" or "dna"."""

    @property
    def vocab_size(self) -> int:
        """One more than the largest token it can make."""

    @property
    def eos_token(self) -> int | None:
        """The token that ends a document, if it has one."""

    @property
    def raw_unit(self) -> str:
        """What a text is measured in: "byte", or "base" of DNA."""

    @property
    def identity(self) -> str:
        """A checksum of everything that decides the tokens."""

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without an end of document."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of several texts."""

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of some tokens; what is not valid text appears as the replacement character."""

    def to_json(self) -> str:
        """All of it as JSON, for `tokenizer_from_json`."""


class ByteTokenizer:
    """UTF-8 bytes as tokens 0 to 255; 256 ends a document, unless there is no `eos`."""

    kind = "bytes"
    raw_unit = "byte"
    vocab_size = 257

    def __init__(self, eos: int | None = BYTES_EOS) -> None:
        if eos not in (None, BYTES_EOS):
            raise UserError(f"byte tokens end a document with {BYTES_EOS} or not at all, not with {eos}")
        self.eos_token = eos

    @property
    def identity(self) -> str:
        """Two names suffice: with and without an end of document."""
        return "bytes-eos" if self.eos_token is not None else "bytes"

    def encode(self, text: str) -> list[int]:
        """The UTF-8 bytes of a text."""
        return list(text.encode("utf-8", errors="surrogateescape"))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The UTF-8 bytes of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the bytes; the end of a document is left out."""
        return bytes(token for token in tokens if token < BYTES_EOS).decode("utf-8", errors="replace")

    def to_json(self) -> str:
        """A short JSON object that names the kind and the end of document."""
        return json.dumps({"kind": self.kind, "eos": self.eos_token})


class HuggingFaceTokenizer:
    """A `tokenizer.json` of the `tokenizers` library. `eos` is the token that ends a document (None: there is none)."""

    kind = "huggingface"
    raw_unit = "byte"

    def __init__(self, source: str, eos: int | None, where: str = "tokenizer") -> None:
        library = import_tokenizers()
        try:
            self._tokenizer = library.Tokenizer.from_str(source)
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{where}: not a readable tokenizers file: {' '.join(str(error).split())[:200]}") from error
        self._source = source
        self.eos_token = eos
        ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        # Not the count: published files have gaps, and the embedding needs a row for the largest id.
        self.vocab_size = max(ids, default=-1) + 1
        if eos is not None and not 0 <= eos < self.vocab_size:
            raise UserError(f"{where}: end-of-document token {eos} is outside the vocabulary of {self.vocab_size}")

    @property
    def identity(self) -> str:
        """A checksum of the file's contents and the end of document."""
        return hashlib.sha256(f"{self.eos_token}\n{self._source}".encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Tokens of a text, without the special tokens a template would add."""
        return list(self._tokenizer.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of several texts; the library releases the interpreter lock meanwhile."""
        return [each.ids for each in self._tokenizer.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of the tokens, without special ones."""
        return str(self._tokenizer.decode(list(tokens)))

    def token_id(self, name: str) -> int | None:
        """The id of a token by its name."""
        found: int | None = self._tokenizer.token_to_id(name)
        return found

    def to_json(self) -> str:
        """The file's contents and the end of document."""
        return json.dumps({"kind": self.kind, "eos": self.eos_token, "tokenizer": self._source})


def import_tokenizers() -> Any:
    """The `tokenizers` library. UserError saying how to install it if it is missing."""
    try:
        import tokenizers
    except ImportError as error:
        raise UserError(
            f"the `tokenizers` library cannot be loaded ({error}): pip install 'protomamba[tokenizers]'"
        ) from error
    return tokenizers


def tokenizer_from_json(text: str) -> Tokenizer:
    """The tokenizer that `to_json` described. UserError if it is not such a description."""
    try:
        value = json.loads(text)
        if value["kind"] == ByteTokenizer.kind:
            return ByteTokenizer(value["eos"])
        if value["kind"] == HuggingFaceTokenizer.kind:
            return HuggingFaceTokenizer(value["tokenizer"], value["eos"])
        if value["kind"] == DnaTokenizer.kind:
            return DnaTokenizer(int(value["k"]), bool(value["case"]))
    except MALFORMED as error:
        raise UserError(f"tokenizer: damaged description: {error}") from error
    raise UserError(f"tokenizer: kind {value['kind']!r}: expected bytes, huggingface or dna")


def load_tokenizer(name: str, eos: str = "auto") -> Tokenizer:
    """`bytes`, or the path of a `tokenizer.json`.

    `eos` names the token that ends a document: by its text or number, `none`, or `auto`: one of `EOS_NAMES`.
    """
    if name == "bytes":
        return _bytes_with_eos(eos)
    path = Path(name)
    try:
        source = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {os_message(error)}; expected `bytes` or a tokenizer.json") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: expected a tokenizer.json, found bytes that are not UTF-8 at {error.start}"
        ) from error
    return with_eos(source, eos, str(path))


def _bytes_with_eos(eos: str) -> Tokenizer:
    if eos not in ("auto", "none", str(BYTES_EOS)):
        raise ConfigError(f"--eos {eos}: bytes end a document with {BYTES_EOS}; expected auto, none or {BYTES_EOS}")
    return ByteTokenizer(None if eos == "none" else BYTES_EOS)


def with_eos(source: str, eos: str, where: str) -> HuggingFaceTokenizer:
    """A Hugging Face tokenizer with its end of document chosen as in `load_tokenizer`."""
    tokenizer = HuggingFaceTokenizer(source, None, where)
    if eos == "none":
        return tokenizer
    names = EOS_NAMES if eos == "auto" else (eos,)
    found = next((number for number in map(tokenizer.token_id, names) if number is not None), None)
    if found is None and eos.isdigit():
        found = int(eos)
    if found is None:
        wanted = f"one of {', '.join(EOS_NAMES)}" if eos == "auto" else repr(eos)
        raise UserError(f"{where}: has no token {wanted} to end a document with; name one with --eos, or --eos none")
    return HuggingFaceTokenizer(source, found, where)


def train_bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> str:
    """Train a byte-level BPE of `vocab_size` tokens on texts; the contents of its `tokenizer.json`.

    The 256 bytes and `<|endoftext|>` are in it, so every text can be encoded. Equal texts give equal files.
    """
    if vocab_size < BYTES_EOS + 1:
        raise ConfigError(
            f"--train-bpe {vocab_size}: expected at least {BYTES_EOS + 1}: the bytes and the end of a document"
        )
    library = import_tokenizers()
    level = library.pre_tokenizers.ByteLevel
    tokenizer = library.Tokenizer(library.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS_NAMES[0]],
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return str(tokenizer.to_str())
