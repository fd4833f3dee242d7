"""adamw: one update of many tensors in one pass over their memory. The definition is in `reference`."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from protomamba.kernels import native, reference
from protomamba.kernels.native import Library
from protomamba.kernels.reference import AdamWTensors


@torch.no_grad()
def adamw(
    updates: Sequence[AdamWTensors], *, lr: float, scale: float, beta1: float, beta2: float, eps: float
) -> list[bool]:
    """One AdamW update of each tensor, in place: see `reference.adamw`, which this equals.

    The gradients count `scale` times. Returns for which tensors a moment would not have been finite; the blocks around
    it are left as they are. The same bits for any number of threads. Native where all are contiguous float32.
    ValueError for shapes that do not fit.
    """
    for u in updates:
        if not u.parameter.shape == u.gradient.shape == u.exp_avg.shape == u.exp_avg_sq.shape or u.step.numel() != 1:
            shapes = [tuple(x.shape) for x in _tensors(u)]
            raise ValueError(f"adamw: expected parameter, gradient and moments of one shape, and a step, got {shapes}")
    simple = bool(updates) and all(_simple(x) for u in updates for x in _tensors(u))
    places = _places(updates) if simple else []
    if simple:
        _check_places(places)
    library = native.select("adamw", updates[0].parameter, (torch.float32,)) if simple else None
    if library is None:
        return reference.adamw(updates, lr=lr, scale=scale, beta1=beta1, beta2=beta2, eps=eps)
    return _native(library, updates, places, lr, scale, beta1, beta2, eps)


def _tensors(u: AdamWTensors) -> tuple[Tensor, ...]:
    return u.parameter, u.gradient, u.exp_avg, u.exp_avg_sq, u.step


def _simple(x: Tensor) -> bool:
    return x.dtype == torch.float32 and x.is_cpu and x.is_contiguous()


def _places(updates: Sequence[AdamWTensors]) -> list[list[int]]:
    """How many elements each has, and the addresses of parameters, gradients, both moments and steps, a list each."""
    sizes = [u.parameter.numel() for u in updates]
    return [sizes, *([x.data_ptr() for x in each] for each in zip(*map(_tensors, updates), strict=True))]


def _check_places(places: Sequence[Sequence[int]]) -> None:
    """ValueError where what is written lies in one memory with another tensor: the result would depend on chance."""
    sizes, parameters, gradients, *moments, steps = places
    pairs = [pair for rows in (parameters, *moments) for pair in zip(rows, sizes, strict=True)]
    written = sorted((start, start + 4 * size) for start, size in [*pairs, *((step, 1) for step in steps)])
    apart = all(before[1] <= after[0] for before, after in pairwise(written))
    starts = [start for start, _ in written]
    for start, size in zip(gradients, sizes, strict=True):
        at = bisect_left(starts, start + 4 * size)
        apart = apart and (at == 0 or written[at - 1][1] <= start)
    if not apart:
        raise ValueError("adamw: expected parameters, moments and steps that share no memory, with a gradient neither")


def _native(
    library: Library,
    updates: Sequence[AdamWTensors],
    places: Sequence[Sequence[int]],
    lr: float,
    scale: float,
    beta1: float,
    beta2: float,
    eps: float,
) -> list[bool]:
    table = torch.tensor(places)
    decay = torch.tensor([u.decay for u in updates], dtype=torch.float64)
    spoilt = torch.empty(len(updates), dtype=torch.int64)
    library.adamw(
        count=len(updates), lr=lr, scale=scale, beta1=beta1, beta2=beta2, eps=eps,
        sizes=table[0], parameters=table[1], gradients=table[2], exp_avg=table[3], exp_avg_sq=table[4],
        steps=table[5], decay=decay, spoilt=spoilt,
    )  # fmt: skip
    # Written behind torch's back: a graph that still needs the old values is to fail, not to go wrong.
    torch.autograd.graph.increment_version([u.parameter for u in updates])
    return [bool(x) for x in spoilt.tolist()]
