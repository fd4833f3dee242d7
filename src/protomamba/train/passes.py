"""The forward and backward passes of one step, gradient shard by gradient shard, and what they come to together.

The rows of each micro-batch are shared out to the shards as numpy.array_split would. A shard's passes see nothing of
the others but the number of all targets, so that their result does not depend on who computes them.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from protomamba.data.windows import Batch
from protomamba.errors import ConfigError
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.comm import Comm
from protomamba.train.comm_rows import RowSum
from protomamba.train.comm_tree import share
from protomamba.train.local import LocalSignals

MicroBatch = tuple[Tensor, Tensor, Tensor | None]  # inputs (B, L), targets (B, L), reset (B, L) or None
AnyBatch = Batch | Sequence[Any]  # a Batch, or inputs, targets and perhaps reset


@dataclass(frozen=True)
class Passes:
    """One step's passes: over which model, ranks and micro-batches, with what.

    shards: how many groups of rows there are. seed, step: of all random numbers drawn where there are several shards.
    local: whether the layers' local losses are wanted. backpropagate: whether gradients are. tables: the parameters
    with row-sparse gradients.
    """

    model: SequenceModel
    comm: Comm
    batches: Sequence[MicroBatch]
    shards: int
    seed: int
    step: int
    local: bool
    backpropagate: bool
    tables: Mapping[str, nn.Parameter] = field(default_factory=dict)

    def run(self) -> tuple[float, int, LocalSignals]:
        """The mean loss over all targets, how many there are, and the local losses' sums, the same on every rank.

        With `backpropagate` the gradients' sums are left at the ranks that own them (see `Comm.finish`), those of
        row-sparse tables at all of them.
        """
        counts = [int((targets_BL >= 0).sum()) for _, targets_BL, _ in self.batches]
        total = sum(self.model.head.weight_of(targets_BL) for _, targets_BL, _ in self.batches) or 1.0
        if self.backpropagate:
            self.comm.open(self.shards)
        rows = RowSum(self.comm, self.shards, self.tables)
        with torch.set_grad_enabled(self.backpropagate):
            found = [self._shard(shard, total, rows) for shard in self._own_shards()]
        if self.backpropagate:
            self.comm.finish()
            rows.finish()
        signals = found[0][1]
        sums = self.comm.sums(torch.stack([torch.cat([loss, each.flat()]) for loss, each in found]))
        signals.load_flat(sums[1:])
        return float(sums[0]), sum(counts), signals

    def _own_shards(self) -> Iterator[int]:
        """This rank's shards; what the head counts on the way stands for each where it stood before the step."""
        shards = self.comm.shards(self.shards)
        counted = [buffer for buffer in self.model.head.buffers() if not buffer.is_floating_point()]
        before = [buffer.clone() for buffer in counted] if len(shards) > 1 else []
        for shard in shards:
            for buffer, value in zip(counted if shard > shards.start else (), before, strict=False):
                buffer.copy_(value)
            yield shard

    def _shard(self, shard: int, total: float, rows: RowSum) -> tuple[Tensor, LocalSignals]:
        """One shard's part of the mean loss, float64 (1,), and its sums for the local losses."""
        signals, mean = LocalSignals(), 0.0
        for number, batch in enumerate(self.batches):
            inputs, targets_BL, reset_BL = rows_of(batch, shard, self.shards)
            weight = self.model.head.weight_of(targets_BL)
            last = number == len(self.batches) - 1
            with self._random(shard, number, batch[1]), self._leaving(shard) if last else contextlib.nullcontext():
                hook = signals if self.local else None
                loss = self.model(inputs, targets_BL, reset_BL=reset_BL, activation_hook=hook)
                if self.backpropagate and loss.requires_grad:
                    (loss if weight == total else loss * (weight / total)).backward()
            mean += float(loss.detach()) * weight / total
        if self.backpropagate:
            rows.take()
            self._hand_in(shard)
        return torch.tensor([mean], dtype=torch.float64), signals

    @contextlib.contextmanager
    def _leaving(self, shard: int) -> Iterator[None]:
        """Each gradient leaves for its owner as soon as it is there, while those of the layers before are computed."""
        named = self.model.named_parameters() if self.comm.world > 1 and self.backpropagate else ()
        hooks = [
            parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
                partial(self._leave, shard, name)
            )
            for name, parameter in named
            if parameter.requires_grad and name not in self.tables
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _leave(self, shard: int, name: str, parameter: Tensor) -> None:
        gradient, parameter.grad = parameter.grad, None
        if gradient is not None:
            self.comm.start(shard, {name: gradient})

    def _hand_in(self, shard: int) -> None:
        named = {name: p for name, p in self.model.named_parameters() if p.grad is not None}
        gradients = {name: p.grad for name, p in named.items() if p.grad is not None}
        for parameter in named.values():
            parameter.grad = None
        self.comm.start(shard, gradients)

    @contextlib.contextmanager
    def _random(self, shard: int, number: int, targets_BL: Tensor) -> Iterator[None]:
        """One shard alone draws from torch's own stream, as any program does; of several, each from one of its own."""
        if self.shards == 1:
            yield
            return
        self.model.head.begin_step(key(self.seed, self.step, number), targets_BL.reshape(-1))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(key(self.seed, self.step, number, shard))
            yield


def rows_of(batch: MicroBatch, shard: int, shards: int) -> MicroBatch:
    """The rows of one shard. ConfigError where there are fewer rows than shards."""
    inputs, targets_BL, reset_BL = batch
    if shards == 1:
        return batch
    require_rows([batch], shards)
    part = share(len(inputs), shards, shard)
    rows = slice(part.start, part.stop)
    return inputs[rows], targets_BL[rows], None if reset_BL is None else reset_BL[rows]


def require_rows(batches: Sequence[MicroBatch], shards: int) -> None:
    """ConfigError where a micro-batch has fewer rows than there are shards."""
    fewest = min(len(inputs) for inputs, _, _ in batches)
    if fewest < shards:
        raise ConfigError(
            f"--grad-shards {shards}: a micro-batch of {fewest} rows cannot be divided among them; raise "
            "--batch-size, or use fewer shards"
        )


def key(*numbers: int) -> int:
    """A whole number from 0 to 2^63 - 1 that depends on all of `numbers` and their order."""
    digest = hashlib.blake2b(repr(numbers).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def micro_batch(batch: AnyBatch) -> MicroBatch:
    """(inputs, targets, reset or None) of a Batch, or of a pair or triple of tensors. TypeError for anything else."""
    if isinstance(batch, Batch):
        return batch.tokens_BL, batch.targets_BL, batch.reset_BL
    if not isinstance(batch, tuple | list) or len(batch) not in (2, 3):
        raise TypeError(
            f"a batch is (inputs, targets), (inputs, targets, reset) or a Batch, not {type(batch).__name__}"
        )
    inputs, targets, *reset = batch
    return inputs, targets, reset[0] if reset else None
