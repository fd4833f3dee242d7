"""Orders that are functions, not state: a keyed permutation of [0, n) that needs no memory and no generator.

An index is written as a pair (left, right) in [0, a) x [0, b) with a * b just above n. A Feistel network over that
pair, with addition modulo a and b, permutes the pairs; a result outside [0, n) is permuted again until it lies inside
(Black and Rogaway 2002, "Ciphers with arbitrary finite domains": generalised Feistel and cycle walking). As a * b - n
is less than a, that is rare for large n.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import numpy.typing as npt

ROUNDS = 6
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)
_HALF = np.uint64(32)


def derive_key(*parts: int) -> int:
    """A 64-bit key from integers; every part and its position changes all of it."""
    key = 0
    for part in parts:
        key = _mix(key ^ (part & _MASK_64))
    return key


def _mix(value: int) -> int:
    """The output function of SplitMix64 (Steele, Lea and Flood 2014)."""
    value = (value + _GOLDEN) & _MASK_64
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK_64
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK_64
    return value ^ (value >> 31)


@lru_cache(maxsize=16)
def _round_keys(key: int) -> tuple[np.uint64, ...]:
    return tuple(np.uint64(derive_key(key, number)) for number in range(ROUNDS))


def shuffled(size: int, key: int) -> npt.NDArray[np.int64]:
    """All of [0, size) in the order chosen by `key`, every order equally likely: for lists short enough to hold."""
    return np.argsort(hashed(np.arange(size), key), kind="stable")


def permute(index: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """Where the permutation of [0, size) chosen by `key` sends each index; indices must lie in [0, size).

    Any few values are spread like random ones; over all n! orders it is not uniform for n below about ten, where
    `shuffled` is the better choice.
    """
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"index outside [0, {size})")
    keys = _round_keys(key)
    value = _feistel(index.astype(np.uint64), size, keys)
    while (outside := np.flatnonzero(value >= size)).size:
        value[outside] = _feistel(value[outside], size, keys)
    return value.astype(np.int64)


def endless(
    numbers: npt.NDArray[np.int64], size: int, seed: int, tag: int
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Epoch and place of some numbers of an endless order, in which each epoch is [0, size) drawn anew by `seed`.

    `tag` tells the orders of one seed apart.
    """
    epochs, within = np.divmod(numbers, size)
    places = np.empty_like(within)
    for epoch in np.unique(epochs).tolist():
        chosen = epochs == epoch
        places[chosen] = permute(within[chosen], size, derive_key(seed, epoch, tag))
    return epochs, places


def hashed(values: npt.NDArray[np.int64], key: int) -> npt.NDArray[np.uint64]:
    """64 well-mixed bits of each value, a pure function of it and of `key`."""
    mixed = values.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def _feistel(value: npt.NDArray[np.uint64], size: int, keys: tuple[np.uint64, ...]) -> npt.NDArray[np.uint64]:
    rows = math.isqrt(size - 1) + 1
    a, b = np.uint64(rows), np.uint64(-(-size // rows))
    left, right = value // b, value % b
    for number, key in enumerate(keys):
        if number % 2 == 0:
            left = (left + _hash(right, key)) % a
        else:
            right = (right + _hash(left, key)) % b
    return left * b + right


def _hash(value: npt.NDArray[np.uint64], key: np.uint64) -> npt.NDArray[np.uint64]:
    """32 well-mixed bits; numpy wraps products of unsigned arrays silently, which is the arithmetic wanted."""
    value = (value + key) * _FIRST
    return ((value ^ (value >> _HALF)) * _SECOND) >> _HALF
