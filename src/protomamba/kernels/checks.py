"""Checks of what an op is given: the suffix of a name is its shape, its first word says what its elements are."""

from __future__ import annotations

import torch
from torch import Tensor

# Of these each element is a whole number, of `reset` a truth value, of all else a real number.
WHOLE = ("targets", "sample", "tokens", "classes", "reserved", "rank")


def check_shapes(
    op: str, *, sizes: dict[str, int] | None = None, like: Tensor | None = None, **tensors: Tensor | None
) -> dict[str, int]:
    """Checks every tensor against its name and returns the size of each letter.

    `u_BLE` has the dimensions B, L and E, `weight_E1K` a 1 in the middle; a letter has one size throughout.
    None is skipped. `sizes` fixes letters beforehand, `like` the device. ValueError names the op, the tensor, what was
    expected and found.
    """
    known = dict(sizes or {})
    on_cpu = None if like is None else like.is_cpu
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        on_cpu = tensor.is_cpu if on_cpu is None else on_cpu
        if tensor.is_cpu != on_cpu:
            raise ValueError(f"{op}: {name}: is on {tensor.device}, and not all others are")
        check_elements(op, name, tensor)
        letters = name.rsplit("_", 1)[1]
        shape = tuple(tensor.shape)
        if len(shape) != len(letters):
            raise ValueError(f"{op}: {name}: expected {len(letters)} dimensions, got shape {shape}")
        for letter, size in zip(letters, shape, strict=True):
            expected = int(letter) if letter.isdigit() else known.setdefault(letter, size)
            if size != expected:
                wanted = ", ".join(f"{key}={known[key]}" if key in known else key for key in letters)
                raise ValueError(f"{op}: {name}: expected shape ({wanted}), got {shape}")
            if size == 0:
                raise ValueError(f"{op}: {name}: has no element, shape {shape}")
    return known


def check_elements(op: str, name: str, tensor: Tensor) -> None:
    """ValueError unless the elements are of the kind that the name stands for, and lie in memory as they read."""
    dtype, word = tensor.dtype, name.split("_", 1)[0]
    if word == "reset":
        fits = dtype is torch.bool
    elif word in WHOLE:
        fits = not (dtype.is_floating_point or dtype.is_complex or dtype is torch.bool)
    else:
        fits = dtype.is_floating_point
    if not fits:
        kind = "bool" if word == "reset" else "integers" if word in WHOLE else "floating-point numbers"
        raise ValueError(f"{op}: {name}: expected {kind}, got {dtype}")
    if tensor.layout is not torch.strided or tensor.is_neg():
        found = "a lazily negated view: resolve_neg() it" if tensor.is_neg() else f"{tensor.layout}: to_dense() it"
        raise ValueError(f"{op}: {name}: expected a plain tensor, got {found}")


def rows_of(op: str, name: str, x: Tensor) -> Tensor:
    """(T, D) of any number of dimensions above none. ValueError for a tensor without them, or without elements."""
    if x.ndim == 0 or x.numel() == 0:
        raise ValueError(f"{op}: {name}: expected rows of at least one element, got shape {tuple(x.shape)}")
    return x.reshape(-1, x.shape[-1])


Span = tuple[int, int]


def span(x: Tensor) -> Span:
    """The addresses of the first byte of a contiguous tensor and of the one behind its last."""
    start = x.data_ptr()
    return start, start + x.numel() * x.element_size()


def overlap(a: Span, b: Span) -> bool:
    """Whether two spans have a byte in common."""
    return a[0] < b[1] and b[0] < a[1]
