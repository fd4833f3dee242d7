"""Names of items (or words) and their tokens: two reserved ones, then the items, as arrays that suit millions.

    0   the boundary: what stands before the first item of a sequence; never a target
    1   unknown: an item without a token of its own; read, never a target
    2   the first item, and so on

The names are one array of UTF-8 bytes and one of places in it, in files beside the manifest and as a part of a
checkpoint. Items that are added later come behind those that are there, so a token means the same item for ever.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.errors import MALFORMED, UserError

BOUNDARY, UNKNOWN, RESERVED = 0, 1, 2


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """Item i is the bytes `names[offsets[i]:offsets[i + 1]]`; its token is i + RESERVED.

    `integers`: the items were whole numbers, and are given back as such.
    """

    names: npt.NDArray[np.uint8]
    offsets: npt.NDArray[np.int64]
    integers: bool = False

    @classmethod
    def of(cls, names: Iterable[str], integers: bool = False) -> Vocabulary:
        """From names in the order of their tokens; each must occur once."""
        encoded = [name.encode() for name in names]
        offsets = np.concatenate(([0], np.cumsum([len(each) for each in encoded], dtype=np.int64)))
        return cls(np.frombuffer(b"".join(encoded), dtype=np.uint8), offsets.astype(np.int64), integers)

    def __len__(self) -> int:
        """How many items there are."""
        return len(self.offsets) - 1

    @property
    def size(self) -> int:
        """Tokens: the items and the reserved ones."""
        return len(self) + RESERVED

    def name(self, token: int) -> str | int:
        """The item of a token. IndexError for a reserved one."""
        if not RESERVED <= token < self.size:
            raise IndexError(f"token {token} is no item")
        text = bytes(self.names[self.offsets[token - RESERVED] : self.offsets[token - RESERVED + 1]]).decode()
        return int(text) if self.integers else text

    @cached_property
    def tokens(self) -> dict[str, int]:
        """Token of each name."""
        whole, places = self.names.tobytes(), self.offsets.tolist()
        return {whole[places[i] : places[i + 1]].decode(): i + RESERVED for i in range(len(self))}

    def encode(self, names: Sequence[str | int]) -> npt.NDArray[np.int64]:
        """Tokens of items, UNKNOWN for those that have none."""
        tokens = self.tokens
        return np.array([tokens.get(str(name), UNKNOWN) for name in names], dtype=np.int64)

    def extended(self, names: Sequence[str], integers: bool) -> Vocabulary:
        """With further items behind those there are."""
        more = Vocabulary.of(names)
        return Vocabulary(
            np.concatenate((self.names, more.names)),
            np.concatenate((self.offsets, more.offsets[1:] + self.offsets[-1])),
            self.integers and integers,
        )

    def begins_with(self, other: Vocabulary) -> bool:
        """Whether all items of the other have the same tokens here."""
        same = np.array_equal(self.offsets[: len(other.offsets)], other.offsets)
        return same and np.array_equal(self.names[: len(other.names)], other.names)

    @property
    def identity(self) -> str:
        """A checksum of the names and their order."""
        return hashlib.sha256(self.offsets.astype("<i8").tobytes() + self.names.tobytes()).hexdigest()

    def state(self) -> dict[str, npt.NDArray[Any]]:
        """As arrays, for a part of a checkpoint."""
        return {
            "names": self.names,
            "offsets": self.offsets,
            "integers": np.array([self.integers], dtype=np.uint8),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any], where: str = "vocabulary") -> Vocabulary:
        """The inverse of `state`, also from tensors. UserError if it is damaged."""
        try:
            names, offsets = (np.asarray(state[key]) for key in ("names", "offsets"))
            integers = bool(np.asarray(state["integers"])[0])
        except MALFORMED as error:
            raise UserError(f"{where}: damaged: {type(error).__name__}: {error}") from error
        sound = names.dtype == np.uint8 and names.ndim == offsets.ndim == 1 and offsets.dtype.kind == "i"
        if (
            not sound
            or not offsets.size
            or offsets[0] != 0
            or offsets[-1] != names.size
            or (np.diff(offsets) < 0).any()
        ):
            raise UserError(f"{where}: damaged: the places of its names do not fit them")
        return cls(names, offsets.astype(np.int64), integers)
