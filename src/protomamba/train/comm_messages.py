"""Messages between ranks: what waiting for one means, and the exchange of small tensors, each from each.

gloo sends in the thread that hands a message in where the other side already waits for it; where it does not, in a
thread of gloo's own, once the other side asks. So a rank that asks last is answered at once, and interrupted by the
answer while it holds gloo's lock, on which gloo's thread then spins: milliseconds a step. Therefore the receive of the
next exchange is posted at the end of the one before, long before anything can arrive.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor

# A message: the size in bytes (int64), then as much of the contents as there is room for. The rest follows in another.
FRAME, HEAD = 4_096, 8
FRAMES, RESTS = 1, 2  # tags
# One message at most takes this long: a rank that is alive may be writing a checkpoint meanwhile.
MESSAGE_S = 1_800.0


class Work(Protocol):
    """A message under way."""

    def wait(self, timeout: timedelta = ...) -> Any: ...


def wait_for(works: Sequence[Work]) -> None:
    """Wait for messages, in order; RuntimeError where a link broke."""
    for work in works:
        work.wait(timedelta(seconds=MESSAGE_S))


class Messages(Protocol):
    """What sends and receives."""

    rank: int

    def send(self, tensor: Tensor, peer: int, tag: int) -> Work: ...
    def receive(self, tensor: Tensor, peer: int, tag: int) -> Work: ...


class Gather:
    """One rank's end of the exchanges among these or any other ranks; any two take part in theirs in one order."""

    def __init__(self, messages: Messages) -> None:
        self._messages = messages
        self._posted: dict[int, tuple[Tensor, Work]] = {}

    def all_gather(self, tensor: Tensor, ranks: Sequence[int], last: bool = False) -> list[Tensor]:
        """The one-dimensional tensors of all of `ranks`, in their order; lengths may differ. last: none will follow."""
        others = [rank for rank in ranks if rank != self._messages.rank]
        for rank in others:
            self._post(rank)
        frame, rest = _packed(tensor)
        works = [self._messages.send(frame, rank, FRAMES) for rank in others]
        works += [self._messages.send(rest, rank, RESTS) for rank in others if len(rest)]
        found = {rank: self._received(rank, last).view(tensor.dtype) for rank in others}
        wait_for(works)
        return [found.get(rank, tensor) for rank in ranks]

    def _post(self, rank: int) -> None:
        if rank not in self._posted:
            frame = torch.empty(FRAME, dtype=torch.uint8)
            self._posted[rank] = frame, self._messages.receive(frame, rank, FRAMES)

    def _received(self, rank: int, last: bool) -> Tensor:
        """A rank's contents in bytes."""
        frame, work = self._posted.pop(rank)
        wait_for([work])
        contents = torch.empty(int(frame[:HEAD].view(torch.int64)), dtype=torch.uint8)
        start, rest = contents[: FRAME - HEAD], contents[FRAME - HEAD :]
        start.copy_(frame[HEAD : HEAD + len(start)])
        if not last:
            self._post(rank)
        if len(rest):
            wait_for([self._messages.receive(rest, rank, RESTS)])
        return contents


def _packed(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """The frame, and what does not fit into it, in bytes."""
    contents, frame = tensor.view(torch.uint8), torch.zeros(FRAME, dtype=torch.uint8)
    frame[:HEAD] = torch.tensor([len(contents)]).view(torch.uint8)
    start, rest = contents[: FRAME - HEAD], contents[FRAME - HEAD :]
    frame[HEAD : HEAD + len(start)] = start
    return frame, rest
