"""A head whose training step looks at a sample of its classes: how often each comes, and which are drawn next."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from protomamba.config import ModelConfig
from protomamba.kernels import Sample
from protomamba.kernels.prototype_loss import total_weight, valid_tokens
from protomamba.kernels.rows import gather_rows
from protomamba.model.heads import rivals, sampling
from protomamba.model.heads.base import Head

# Targets that share a sample: many, so that a product is worth its start; few, so that what a sample happens to hold
# is not what all tokens of a step are held against.
GROUP = 512
# Runs of a group at most, whose rows have chances of their own.
RUNS = 16

SampledLoss = Callable[..., Tensor]


class SamplingHead(Head):
    """Base of our heads that sample: they set `sample`, say in `samples_classes` whether they do, and ask for the
    buffers (`count_draws`, `count_classes`), which are in checkpoints.

    A token is held against the classes of its own rows and each one's rival, against those of the batch's other rows,
    and against even ones.
    """

    # Whether the loss adds up the gradient of a dense table over all groups itself: it is given the table, not rows.
    whole_table = False
    sample: int
    draws: Tensor
    counts: Tensor
    counted: Tensor
    told: Tensor
    rivals: Tensor
    rival_counts: Tensor

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
        # The rival of each class, itself where none was found; how often those come whose rival a class is.
        self.register_buffer("rivals", torch.arange(self.classes))
        self.register_buffer("rival_counts", torch.zeros(self.classes, dtype=torch.int64))

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

    def next_samples(self, targets_BL: Tensor) -> list[Sample]:
        """A sample of the next forward pass for each GROUP of its targets; moves the counts on. All classes: none.

        targets_BL: (B, L), or (T,) for rows of one.
        """
        shared, self._shared = self._shared, None
        if not self.samples_classes:
            return []
        key, shared_T = shared or (int(self.draws), targets_BL)
        self.draws.add_(1)
        shared_T = shared_T.reshape(-1)
        shared_T = shared_T[shared_T >= 0]
        self._count(shared_T)
        return self._samples(key, targets_BL, shared_T)

    def draw(self, key: int, targets_BL: Tensor) -> list[Sample]:
        """`next_samples` of a step with these targets and no others: a function of the key and of the frequencies."""
        return self._samples(key, targets_BL, targets_BL[targets_BL >= 0])

    def _samples(self, key: int, targets_BL: Tensor, shared_T: Tensor) -> list[Sample]:
        rows_BL, common_U = targets_BL.reshape(len(targets_BL), -1), sampling.distinct(shared_T)
        tokens_B = (rows_BL >= 0).sum(1).tolist()
        even = sampling.even_draws(self.sample, len(common_U))
        # What lengths follow (`steadiness`) is to be the same on all ranks, whatever their own targets.
        kept, groups = min(1.0, (self.sample - even) / max(1, len(common_U))), math.ceil(len(shared_T) / GROUP)
        self._drawn = sampling.Drawing(len(shared_T), kept, even, self.classes, max(1, groups))
        return [
            self._sample(sampling.key_of_group(key, number), group, rows_BL, tokens_B, common_U)
            for number, group in enumerate(sampling.groups_of(tokens_B, GROUP, RUNS))
        ]

    def _sample(
        self, key: int, group: list[sampling.Run], targets_BL: Tensor, tokens_B: list[int], common_U: Tensor
    ) -> Sample:
        """That of one group of tokens. What is in a run's rows is known with its features: it was sure to be drawn."""
        assert self._drawn is not None
        inside = [slice(run.rows.start, run.rows.stop) for run in group]
        own_R = [self._with_rivals(targets_BL[each]) for each in inside]
        tokens_R = [sum(tokens_B[each]) for each in inside]
        drawn = sampling.draw(key, sampling.distinct(torch.cat(own_R)), common_U, self.classes, self.sample)
        found_S = drawn.classes_S
        share_S, rival_S = self._shares(self.counts[found_S]), self.rival_counts[found_S] / self.counted.clamp_min(1)
        chances = sampling.Chances(share_S, rival_S, self._drawn, drawn, sum(tokens_R))
        return Sample(found_S, chances.of_runs(tokens_R, own_R).float(), tuple(run.tokens for run in group))

    def _with_rivals(self, targets_BL: Tensor) -> Tensor:
        """(U,): the distinct classes among the targets and their rivals, in rising order."""
        targets_T = targets_BL[targets_BL >= 0]
        return sampling.distinct(torch.cat([targets_T, self.rivals[targets_T]]))

    def _renew_rivals(self, table_VD: Tensor, targets_BL: Tensor) -> None:
        """Look for rivals, if it is time: by what all ranks have in common."""
        if not self.samples_classes or int(self.draws) % rivals.EVERY:
            return
        shared_T = targets_BL if self._shared is None else self._shared[1]
        common_U = sampling.distinct(shared_T[shared_T >= 0])
        found_P, among = rivals.probes(int(self.draws) // rivals.EVERY, common_U, *table_VD.shape)
        self.rivals[found_P] = rivals.nearest(table_VD.detach(), found_P, among, self.rivals[found_P])
        has_K = (self.rivals != torch.arange(self.classes)).nonzero()[:, 0]
        self.rival_counts.zero_().index_add_(0, self.rivals[has_K], self.counts[has_K])

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
        self, op: SampledLoss, table_VD: Tensor, z_BLD: Tensor, targets_BL: Tensor, weight_T: Tensor | None
    ) -> Tensor:
        """op(z, rows, targets, samples, weights), the mean over all targets, with this step's samples: see
        `kernels.reference.grouped_prototype_loss`; none for all classes.

        The op gets the whole table where that is dense and there is one sample or it wants that, else the rows (R, D)
        that targets and samples need, their numbers standing for places in them.
        """
        self._renew_rivals(table_VD, targets_BL)
        samples = self.next_samples(targets_BL)
        z_TD, targets_T = z_BLD.reshape(-1, self.d_model), targets_BL.reshape(-1)
        if not samples or (not self.row_sparse and (len(samples) < 2 or self.whole_table)):
            return op(z_TD, table_VD, targets_T, samples, weight_T)
        rows_R = sampling.distinct(torch.cat([targets_T[targets_T >= 0], *(sample.classes_S for sample in samples)]))
        rows_RD = gather_rows(table_VD, rows_R) if self.row_sparse else table_VD.index_select(0, rows_R)
        places_T = torch.where(targets_T < 0, targets_T, torch.searchsorted(rows_R, targets_T.clamp_min(0)))
        numbered = [sample._replace(classes_S=torch.searchsorted(rows_R, sample.classes_S)) for sample in samples]
        return op(z_TD, rows_RD, places_T, numbered, weight_T)


def mean_of_groups(
    op: Callable[..., Tensor], z_TD: Tensor, rows_RD: Tensor, targets_T: Tensor, samples: list[Sample],
    weight_T: Tensor | None,
) -> Tensor:  # fmt: skip
    """op(z, rows, targets, classes, log chances (T, S), weights) of each group, the mean over all targets."""
    z_TD, targets_T, weight_T = valid_tokens(z_TD, targets_T, weight_T)
    sizes = [sample.tokens for sample in samples]
    weights = [None] * len(samples) if weight_T is None else list(torch.split(weight_T, sizes))
    loss, whole = z_TD.new_zeros(()), total_weight(targets_T, weight_T)
    groups = zip(torch.split(z_TD, sizes), torch.split(targets_T, sizes), weights, samples, strict=True)
    for z, targets, weight, sample in groups:
        part = op(z, rows_RD, targets, sample.classes_S, sample.log_chance_TS(), weight)
        loss = loss + total_weight(targets, weight) / whole * part
    return loss
