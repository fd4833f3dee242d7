"""How often each class is a target, told to a head that samples its wrong classes: it corrects for the likely ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from protomamba.data.source import Source, StreamSpec
from protomamba.data.windows import Batch
from protomamba.model.heads import Head

# Targets that frequencies are estimated from where the source has not counted them: a class of one in 100,000 comes
# 20 times, and reading them takes a fraction of a second.
TARGETS = 2_000_000


def set_class_frequencies(head: Head, source: Source, spec: StreamSpec) -> None:
    """Give the head the source's own counts, or those of TARGETS targets spread evenly over it. Heads that look at
    every class are left alone."""
    if not head.samples_classes:
        return
    counts = source.class_counts()
    if counts is not None:
        head.set_frequencies(padded(torch.from_numpy(counts), head.classes))
        return
    batches = source.eval_batches(spec, max(1, TARGETS // (spec.batch_size * spec.seq_len)))
    head.set_frequencies(counted(batches, head.classes))


def counted(batches: Iterable[Batch], classes: int) -> Tensor:
    """(V,) int64: how often each class is a target of these batches."""
    counts_V = torch.zeros(classes, dtype=torch.int64)
    for batch in batches:
        targets_T = batch.targets_BL[batch.targets_BL >= 0]
        counts_V.index_add_(0, targets_T, torch.ones_like(targets_T))
    return counts_V


def padded(counts: Tensor, classes: int) -> Tensor:
    """(V,) int64, with zeros for classes that the data does not have."""
    return torch.cat([counts.long(), torch.zeros(classes - len(counts), dtype=torch.int64)])
