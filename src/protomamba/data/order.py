"""Orders that are functions, not state: a keyed permutation of [0, n) that needs no memory and no generator.

A balanced Feistel network permutes [0, 4^h), the smallest such range that holds n; walking along the cycle until the
value is below n (Black and Rogaway 2002, "Ciphers with arbitrary finite domains", method "cycle walking") gives a
permutation of [0, n). The range is less than 4n, so the walk takes fewer than 4 steps on average.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

ROUNDS = 8
_MASK_64 = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


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


def _mix_array(value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    # numpy wraps arrays of unsigned integers silently, which is the arithmetic wanted
    value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return value ^ (value >> np.uint64(31))


def permute(index: npt.NDArray[np.int64], size: int, key: int) -> npt.NDArray[np.int64]:
    """Where the permutation of [0, size) chosen by `key` sends each index; indices must lie in [0, size)."""
    if index.size and not 0 <= int(index.min()) <= int(index.max()) < size:
        raise IndexError(f"index outside [0, {size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    round_keys = [np.uint64(derive_key(key, number)) for number in range(ROUNDS)]
    value = _feistel(index.astype(np.uint64), half, round_keys)
    while (outside := np.flatnonzero(value >= size)).size:
        value[outside] = _feistel(value[outside], half, round_keys)
    return value.astype(np.int64)


def _feistel(value: npt.NDArray[np.uint64], half: int, round_keys: list[np.uint64]) -> npt.NDArray[np.uint64]:
    shift, mask = np.uint64(half), np.uint64((1 << half) - 1)
    left, right = value >> shift, value & mask
    for key in round_keys:
        left, right = right, left ^ (_mix_array(right + key) & mask)
    return (left << shift) | right
