"""Shape checks: the suffix of a name is its shape."""

from __future__ import annotations

from torch import Tensor


def check_shapes(op: str, *, sizes: dict[str, int] | None = None, **tensors: Tensor | None) -> dict[str, int]:
    """Checks every tensor against the suffix of its name and returns the size of each letter.

    `u_BLE` has the dimensions B, L and E, `weight_E1K` a 1 in the middle; a letter has one size throughout.
    None is skipped. `sizes` fixes letters beforehand. ValueError names the op, the tensor, what was expected and found.
    """
    known = dict(sizes or {})
    on_cpu = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        on_cpu = tensor.is_cpu if on_cpu is None else on_cpu
        if tensor.is_cpu != on_cpu:
            raise ValueError(f"{op}: {name}: is on {tensor.device}, and not all others are")
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
