"""Sequences in batches of like length, and the model's vectors for them in chunks: memory does not grow with length.

The order of work is a function of the sequences alone, and windows of them are worked on one after another: a job that
goes on at a window does with it what the job that was never interrupted did, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from protomamba.model.sequence_model import ModelState, SequenceModel

# int64 (L,) of tokens, or float32 (L, C) of measured values.
Array = npt.NDArray[Any]
Item = TypeVar("Item")

WINDOW_ROWS = 4_096
WINDOW_STEPS = 1 << 20
BATCH_STEPS = 1 << 13
BATCH_ROWS = 256
CHUNK_STEPS = 2_048
ALIKE = 8  # steps that any two sequences of a batch may differ by


@dataclass(frozen=True)
class Chunk:
    """Steps `start` to `start + L` of a batch: z (B, L, D), what the head sees, and the step that follows each one.

    lengths: of the whole sequences; next: padded where they end.
    """

    rows: Sequence[int]
    start: int
    z_BLD: Tensor
    next_BL: Tensor
    lengths_B: Tensor

    def last(self) -> Iterator[tuple[int, Tensor]]:
        """(row, z (D,) at its last step) of each sequence that ends in this chunk."""
        ends_B = self.lengths_B - 1 - self.start
        for place, end in enumerate(ends_B.tolist()):
            if 0 <= end < self.z_BLD.shape[1]:
                yield self.rows[place], self.z_BLD[place, end]

    def has_next(self) -> Tensor:
        """bool (B, L): whether the sequence goes on after a step."""
        steps_L = torch.arange(self.start, self.start + self.z_BLD.shape[1])
        return steps_L[None] < self.lengths_B[:, None] - 1


def windows(items: Iterable[Item], steps_of: Callable[[Item], int]) -> Iterator[list[Item]]:
    """Consecutive items: at most WINDOW_ROWS, and not many more than WINDOW_STEPS steps."""
    window: list[Item] = []
    steps = 0
    for item in items:
        window.append(item)
        steps += steps_of(item)
        if len(window) == WINDOW_ROWS or steps >= WINDOW_STEPS:
            yield window
            window, steps = [], 0
    if window:
        yield window


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of the sequences, longest first, so many at a time that a batch stays near BATCH_STEPS steps.

    A power of two of them, none much shorter than half the longest. With `padded_length` that leaves few shapes: the
    library of the products keeps memory for each it has seen, up to a thousand of them.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    start = 0
    while start < len(order):
        longest = padded_length(lengths[order[start]])
        most = min(BATCH_ROWS, max(1, BATCH_STEPS // max(1, longest)))
        fits = sum(lengths[row] >= longest // 2 - ALIKE for row in order[start : start + most])
        size = 1 << (fits.bit_length() - 1)
        yield order[start : start + size]
        start += size


def padded_length(length: int) -> int:
    """The length rounded up by at most a sixteenth, of its last chunk where it has several."""
    whole, rest = divmod(length, CHUNK_STEPS)
    step = 1 << max(0, rest.bit_length() - 5)
    return whole * CHUNK_STEPS + -(-rest // step) * step


@torch.no_grad()
def run(model: SequenceModel, window: Sequence[Array]) -> Iterator[Chunk]:
    """The chunks of all sequences of a window, each padded on the right, which a causal model does not see.

    In float32 like decoding, also where the model was trained with products in bf16.
    """
    lengths = [len(sequence) for sequence in window]
    for rows in batches(lengths):
        inputs = _padded([window[row] for row in rows])
        lengths_B = torch.tensor([lengths[row] for row in rows])
        state: ModelState | None = None
        for start in range(0, inputs.shape[1] - 1, CHUNK_STEPS):
            stop = min(start + CHUNK_STEPS, inputs.shape[1] - 1)
            more = stop < inputs.shape[1] - 1
            z_BLD, state = model.features(inputs[:, start:stop], state=state, return_state=more, precision="fp32")
            yield Chunk(rows, start, z_BLD, inputs[:, start + 1 : stop + 1], lengths_B)


def _padded(sequences: Sequence[Array]) -> Tensor:
    """(B, padded length + 1, ...): one step of padding at least, so that every step has one after it."""
    longest = padded_length(max(len(sequence) for sequence in sequences))
    padded = np.zeros((len(sequences), longest + 1, *sequences[0].shape[1:]), sequences[0].dtype)
    for row, sequence in enumerate(sequences):
        padded[row, : len(sequence)] = sequence
    return torch.from_numpy(padded)
