"""A head whose training step looks at a sample of its classes: how often each comes, and which are drawn next."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from protomamba.config import ModelConfig
from protomamba.kernels.prototype_loss import total_weight, valid_tokens
from protomamba.kernels.rows import gather_rows
from protomamba.model.heads import sampling
from protomamba.model.heads.base import Head

# Targets that share a sample: many, so that a product is worth its start; few, so that what a sample happens to hold
# is not what all tokens of a step are held against.
GROUP = 512

Sample = tuple[Tensor, Tensor]  # classes (S,), in rising order, and the log of each one's chance to be among them
SampledLoss = Callable[..., Tensor]


class SamplingHead(Head):
    """Base of our heads that sample: they set `sample`, say in `samples_classes` whether they do, and ask for the
    buffers (`count_draws`, `count_classes`), which are in checkpoints."""

    sample: int
    draws: Tensor
    counts: Tensor
    counted: Tensor
    told: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self._shared: tuple[int, Tensor] | None = None
        self._drawn: sampling.Drawing | None = None

    def count_draws(self) -> None:
        """Keep how many samples were drawn: the next is a function of it, so that a resumed run draws the same ones."""
        self.register_buffer("draws", torch.zeros((), dtype=torch.int64))

    def count_classes(self) -> None:
        """Keep how often each class comes: the source's counts where it `told` them, else those of targets so far."""
        self.register_buffer("counts", torch.zeros(self.classes, dtype=torch.int64))
        self.register_buffer("counted", torch.zeros((), dtype=torch.int64))
        self.register_buffer("told", torch.zeros((), dtype=torch.bool))

    def reads_few_rows(self) -> bool:
        return self.samples_classes

    def begin_step(self, key: int, targets_T: Tensor) -> None:
        """The next forward pass draws its sample by this key for these targets: those of all ranks (see `Head`)."""
        self._shared = (key, targets_T)

    def forget_step(self) -> None:
        """A pass that draws nothing leaves no key behind either."""
        self._shared = None

    def set_frequencies(self, counts_V: Tensor) -> None:
        """Take how often each class comes from the source (V,), instead of counting while training.

        ValueError unless it is a whole number >= 0 for every class, and one of them is not 0.
        """
        if "counts" not in self._buffers:
            return
        if counts_V.shape != (self.classes,) or int(counts_V.min()) < 0 or int(counts_V.max()) < 1:
            raise ValueError(
                f"set_frequencies: expected {self.classes:,} counts >= 0, not all of them 0, got shape "
                f"{tuple(counts_V.shape)} from {counts_V.min()} to {counts_V.max()}"
            )
        self.counts.copy_(counts_V)
        self.counted.copy_(self.counts.sum())
        self.told.fill_(True)

    def next_samples(self, targets_T: Tensor) -> list[Sample]:
        """A sample of the next forward pass for each GROUP of its targets; moves the counts on. All classes: none."""
        shared, self._shared = self._shared, None
        if not self.samples_classes:
            return []
        key, shared_T = shared or (int(self.draws), targets_T)
        self.draws.add_(1)
        wanted_T = shared_T.reshape(-1)
        wanted_T = wanted_T[wanted_T >= 0]
        self._count(wanted_T)
        own, of_all = (max(1, math.ceil(n / GROUP)) for n in (int((targets_T >= 0).sum()), len(wanted_T)))
        # What lengths follow (`steadiness`) is to be the same on all ranks, whatever their own targets.
        common_U = torch.unique(wanted_T)
        keys = (sampling.key_of_group(key, group) for group in range(own))
        return [self._draw(each, common_U, len(wanted_T), of_all) for each in keys]

    def draw(self, key: int, targets_T: Tensor) -> Sample:
        """Classes (S,), in rising order, and the log of each one's chance to be among them: a function of the key,
        of the targets (T,), all >= 0, and of the frequencies."""
        return self._draw(key, torch.unique(targets_T), len(targets_T))

    def _draw(self, key: int, common_U: Tensor, targets: int, groups: int = 1) -> Sample:
        """One of `groups` samples of a step with so many targets, of the classes `common_U`."""
        sample_S, kept = sampling.draw(key, common_U, self.classes, self.sample)
        even = sampling.even_draws(self.sample, len(common_U))
        self._drawn = sampling.Drawing(targets, kept, even, self.classes, groups)
        return sample_S, sampling.log_chances(self._shares(self.counts[sample_S]), self._drawn).float()

    def steadiness(self) -> Tensor | None:
        """(V,) float64: `sampling.steadiness` of each class in steps like the last one; None before the first.

        To the power of T / GROUP where a step has T targets, fewer than GROUP: what so few say of a class is noise
        above all, and prototypes that turn the more would be led astray by it.
        """
        if self._drawn is None:
            return None
        whole_V = sampling.steadiness(self._shares(self.counts), self._drawn)
        return whole_V ** min(1.0, self._drawn.targets / GROUP)

    def _shares(self, counts_S: Tensor) -> Tensor:
        return (counts_S + 0.5) / (self.counted + 0.5 * self.classes)

    def _count(self, targets_T: Tensor) -> None:
        if not self.told:
            self.counts.index_add_(0, targets_T, torch.ones_like(targets_T))
            self.counted.add_(len(targets_T))

    def sampled_loss(
        self, op: SampledLoss, table_VD: Tensor, z_TD: Tensor, targets_T: Tensor, weight_T: Tensor | None
    ) -> Tensor:
        """op(z, rows, targets, samples, weights), the mean over all targets, with this step's samples: see
        `kernels.reference.grouped_prototype_loss`; none for all classes.

        The op gets the whole table where that is dense and there is one sample, else the rows (R, D) that targets and
        samples need, their numbers standing for places in them.
        """
        samples = self.next_samples(targets_T)
        if len(samples) < 2 and not (samples and self.row_sparse):
            return op(z_TD, table_VD, targets_T, samples, weight_T)
        rows_R = torch.unique(torch.cat([targets_T[targets_T >= 0], *(sample_S for sample_S, _ in samples)]))
        rows_RD = gather_rows(table_VD, rows_R) if self.row_sparse else table_VD.index_select(0, rows_R)
        places_T = torch.where(targets_T < 0, targets_T, torch.searchsorted(rows_R, targets_T.clamp_min(0)))
        numbered = [(torch.searchsorted(rows_R, sample_S), log_chance_S) for sample_S, log_chance_S in samples]
        return op(z_TD, rows_RD, places_T, numbered, weight_T)


def mean_of_groups(
    op: Callable[..., Tensor], z_TD: Tensor, rows_RD: Tensor, targets_T: Tensor, samples: list[Sample],
    weight_T: Tensor | None,
) -> Tensor:  # fmt: skip
    """op(z, rows, targets, classes, log chances, weights) of each group, the mean over all targets."""
    if len(samples) == 1:
        return op(z_TD, rows_RD, targets_T, *samples[0], weight_T)
    z_TD, targets_T, weight_T = valid_tokens(z_TD, targets_T, weight_T)
    size = math.ceil(len(targets_T) / len(samples))
    weights = [None] * len(samples) if weight_T is None else torch.split(weight_T, size)
    loss, whole = z_TD.new_zeros(()), total_weight(targets_T, weight_T)
    parts = torch.split(z_TD, size), torch.split(targets_T, size), weights
    for z, targets, weight, sample in zip(*parts, samples, strict=False):
        loss = loss + total_weight(targets, weight) / whole * op(z, rows_RD, targets, *sample, weight)
    return loss
