"""DNA as tokens: bases, or words of K bases that do not overlap (k-mers), and the tokens of the other strand.

    0   the boundary of a record        1   unknown: N and the other codes for several bases, read and never a target
    2   A (or AA..A), then C, G, T; with the case kept also a, c, g, t: soft-masked bases

U is read as T. A k-mer with an unknown base is unknown.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from protomamba.data.vocabulary import BOUNDARY, RESERVED, UNKNOWN
from protomamba.errors import ConfigError, UserError

UPPER, LOWER = "ACGT", "acgt"
# IUPAC codes for several bases, and the gap of an alignment.
SEVERAL = "NRYSWKMBDHVnryswkmbdhv-."
SPACE = b"\r\n\t "
MAX_SIZE = 1 << 24
INVALID = 255


@dataclass(frozen=True)
class DnaTokenizer:
    """`k` bases a token; `case` tells soft-masked (lower-case) bases apart."""

    k: int = 1
    case: bool = False
    kind = "dna"
    raw_unit = "base"
    eos_token = BOUNDARY

    def __post_init__(self) -> None:
        if not 1 <= self.k <= 20 or len(self.letters) ** self.k > MAX_SIZE:
            most = next(k for k in range(20, 0, -1) if len(self.letters) ** k <= MAX_SIZE)
            raise ConfigError(f"--kmer {self.k}: expected 1 to {most}, as there are {len(self.letters)}^K words")

    @property
    def letters(self) -> str:
        return UPPER + LOWER if self.case else UPPER

    @property
    def vocab_size(self) -> int:
        return RESERVED + int(len(self.letters) ** self.k)

    @property
    def identity(self) -> str:
        return f"dna-{self.k}{'-case' if self.case else ''}"

    @cached_property
    def table(self) -> bytes:
        """For `bytes.translate`: the code of each letter, one more than the last for unknown, INVALID elsewhere."""
        table = bytearray([INVALID] * 256)
        for letter in SEVERAL:
            table[ord(letter)] = len(self.letters)
        for code, letter in enumerate(UPPER + LOWER):
            table[ord(letter)] = code if self.case else code % 4
        table[ord("U")], table[ord("u")] = table[ord("T")], table[ord("t")]
        return bytes(table)

    def codes(self, text: bytes) -> npt.NDArray[np.uint8]:
        """A code for each base, white space left out; INVALID for what is none."""
        return np.frombuffer(text.translate(self.table, SPACE), dtype=np.uint8)

    def tokens(self, codes: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
        """Tokens of codes, as many as make whole words."""
        words = codes[: len(codes) - len(codes) % self.k].reshape(-1, self.k).astype(np.int64)
        weights = len(self.letters) ** np.arange(self.k - 1, -1, -1)
        unknown = (words >= len(self.letters)).any(axis=1)
        return np.where(unknown, UNKNOWN, words @ weights + RESERVED)

    def complement(self) -> npt.NDArray[np.int64]:
        """For each token that of the same place on the other strand: letters complemented, in reverse."""
        words = np.arange(len(self.letters) ** self.k)
        turned = np.zeros_like(words)
        for _ in range(self.k):
            words, code = np.divmod(words, len(self.letters))
            turned = turned * len(self.letters) + (code // 4) * 4 + 3 - code % 4
        return np.concatenate((np.arange(RESERVED), turned + RESERVED))

    def encode(self, text: str) -> list[int]:
        """Tokens of bases; those left over at the end, too few for a word, are dropped. UserError for other letters."""
        codes = self.codes(text.encode("utf-8", "replace"))
        if (codes == INVALID).any():
            wrong = next(c for c in text if not c.isspace() and (c not in SEVERAL + UPPER + LOWER + "Uu"))
            raise UserError(f"expected bases ({UPPER}, N for unknown), found {wrong!r} in {text[:40]!r}")
        return [int(token) for token in self.tokens(codes)]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokens of several texts."""
        return [self.encode(text) for text in texts]

    def decode(self, tokens: Sequence[int]) -> str:
        """Bases of tokens; N for unknown, nothing for a boundary."""
        base = len(self.letters)
        words = []
        for token in tokens:
            places = [(token - RESERVED) // base**i % base for i in range(self.k - 1, -1, -1)]
            words.append("".join(self.letters[code] for code in places))
        unknown = {BOUNDARY: "", UNKNOWN: "N" * self.k}
        return "".join(unknown.get(token, word) for token, word in zip(tokens, words, strict=True))

    def to_json(self) -> str:
        return json.dumps({"kind": self.kind, "k": self.k, "case": self.case})
