"""Windows of tokens to batches of tensors: training rows, the fixed windows of an evaluation, tokens in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from protomamba.errors import UserError
from protomamba.words import counted

if TYPE_CHECKING:
    from protomamba.data.shards import ShardSet

Tokens = npt.NDArray[np.int64]

Cursor = dict[str, int | str]


@dataclass(frozen=True)
class Batch:
    """Rows to train on: int64 tokens and the tokens that follow each, both B x L.

    `reset_BL` (bool, or None if states never reset) is true where a document begins: the state is zeroed before that
    position. Position 0 of a row starts from the zero state anyway and is never marked. `cursor` is the place after
    this batch: saved once the batch has been consumed, it makes the next one come next.
    """

    tokens_BL: torch.Tensor
    targets_BL: torch.Tensor
    reset_BL: torch.Tensor | None
    cursor: Cursor

    @property
    def epoch(self) -> int:
        """The epoch in which the window after this batch lies."""
        return int(self.cursor["epoch"])


def window_counts(shards: ShardSet, seq_len: int) -> npt.NDArray[np.int64]:
    """Windows in each shard. UserError if there is none at all."""
    counts = np.array([(shard.tokens - 1) // seq_len for shard in shards.shards], dtype=np.int64)
    if not counts.any():
        longest = max(shards.shards, key=lambda shard: shard.tokens)
        raise UserError(
            f"{longest.where}: {counted(longest.tokens, 'token')}, shorter than one window: expected at least "
            f"seq_len + 1 = {seq_len + 1}; give more tokens or a smaller --seq-len"
        )
    return counts


def read_windows(shards: ShardSet, rows: Sequence[tuple[int, int]], seq_len: int) -> Tokens:
    """The windows (shard, number) as an array B x (L + 1); neighbours in the file are read at once."""
    out = np.empty((len(rows), seq_len + 1), dtype=np.int64)
    first = 0
    for last in range(1, len(rows) + 1):
        shard, window = rows[first]
        if last < len(rows) and rows[last] == (shard, window + last - first):
            continue
        run = shards.read(shard, window * seq_len, (window + last - first) * seq_len + 1)
        out[first:last, :-1] = run[:-1].reshape(last - first, seq_len)
        out[first:last, -1] = run[seq_len::seq_len]
        first = last
    return out


def make_batch(tokens: Tokens, eos_token: int | None, cursor: Cursor) -> Batch:
    inputs = np.ascontiguousarray(tokens[:, :-1])
    reset = None
    if eos_token is not None:
        reset_array = np.zeros(inputs.shape, dtype=bool)
        reset_array[:, 1:] = inputs[:, :-1] == eos_token
        reset = torch.from_numpy(reset_array)
    return Batch(torch.from_numpy(inputs), torch.from_numpy(np.ascontiguousarray(tokens[:, 1:])), reset, cursor)


def eval_batches(
    shards: ShardSet,
    batch_size: int,
    seq_len: int,
    count: int | None = None,
    *,
    eos_token: int | None = None,
    reset_at_eos: bool = False,
) -> Iterator[Batch]:
    """The same windows every time, spread evenly over the set: at most `count` batches (None: every window).

    The last batch has fewer rows if the set has fewer windows than asked for. UserError at the call if it has none.
    The cursors are empty: there is nothing to resume.
    """
    windows = window_counts(shards, seq_len)
    ends = np.cumsum(windows)
    total = int(ends[-1])
    wanted = total if count is None else min(total, count * batch_size)
    eos = eos_token if reset_at_eos else None

    def batches() -> Iterator[Batch]:
        for first in range(0, wanted, batch_size):
            places = [number * total // wanted for number in range(first, min(first + batch_size, wanted))]
            slots = [int(np.searchsorted(ends, place, side="right")) for place in places]
            rows = [(slot, place - int(ends[slot] - windows[slot])) for slot, place in zip(slots, places, strict=True)]
            yield make_batch(read_windows(shards, rows, seq_len), eos, {})

    return batches()


def batch_from_tokens(
    tokens: Sequence[int] | npt.NDArray[Any] | torch.Tensor, cursor: int, batch_size: int, seq_len: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets (int64, B x L) from tokens in memory: consecutive windows from `cursor`, wrapping at the end.

    Row b holds tokens cursor + b * L onwards, its targets are one further on. The next batch's cursor is
    `cursor + batch_size * seq_len`. ValueError for fewer than two tokens, a negative cursor or an empty shape.
    """
    tokens_N = torch.as_tensor(tokens, dtype=torch.int64)
    if tokens_N.ndim != 1 or tokens_N.numel() < 2 or cursor < 0 or batch_size < 1 or seq_len < 1:
        raise ValueError(
            f"expected at least 2 tokens, cursor >= 0, batch_size >= 1, seq_len >= 1; found tokens of shape "
            f"{tuple(tokens_N.shape)}, {cursor}, {batch_size}, {seq_len}"
        )
    starts_B1 = cursor + seq_len * torch.arange(batch_size).unsqueeze(1)
    places_BL = starts_B1 + torch.arange(seq_len)
    return tokens_N[places_BL % tokens_N.numel()], tokens_N[(places_BL + 1) % tokens_N.numel()]
