"""The one judge of "the same to the bit": what resume, ranks and migrations are held to."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor


def differences(one: Any, other: Any, where: str = "") -> Iterator[str]:
    """Every place at which two nested states differ, in words; nothing where they are the same to the bit.

    Tensors differ in shape, dtype, or any byte: 0.0 is not -0.0, and a NaN is itself only with the same payload.
    Floats are compared by their bytes, other plain values by type and equality, containers by type, length, keys and
    the order of the keys.
    """
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        yield from _tensor_differences(one, other, where)
    elif type(one) is not type(other):
        yield f"{where}: {type(one).__name__}, not {type(other).__name__}"
    elif isinstance(one, Mapping):
        if list(one) != list(other):
            yield f"{where}: the keys {list(one)}, not {list(other)}"
        else:
            for key in one:
                yield from differences(one[key], other[key], f"{where}.{key}" if where else str(key))
    elif isinstance(one, list | tuple):
        if len(one) != len(other):
            yield f"{where}: {len(one)} items, not {len(other)}"
        else:
            for index, pair in enumerate(zip(one, other, strict=True)):
                yield from differences(*pair, f"{where}[{index}]")
    elif isinstance(one, float):
        if struct.pack("d", one) != struct.pack("d", other):
            yield f"{where}: {one!r}, not {other!r}"
    elif one != other:
        yield f"{where}: {one!r}, not {other!r}"


def same(one: Any, other: Any) -> bool:
    """Whether two nested states are the same to the bit: see `differences`."""
    return next(differences(one, other), None) is None


def _tensor_differences(one: Tensor, other: Tensor, where: str) -> Iterator[str]:
    if one.dtype != other.dtype or one.shape != other.shape:
        yield f"{where}: {one.dtype} {tuple(one.shape)}, not {other.dtype} {tuple(other.shape)}"
        return
    unequal = (_bytes(one) != _bytes(other)).view(-1, max(1, one.element_size())).any(-1)
    if count := int(unequal.sum()):
        first = int(unequal.nonzero()[0])
        values = f"{one.flatten()[first].item()!r}, not {other.flatten()[first].item()!r}"
        yield f"{where}: {count:,} of {one.numel():,} elements, the first at {first}: {values}"


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
