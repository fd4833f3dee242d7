"""A head whose training step looks at a sample of its classes: how often each comes, and which are drawn next."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from protomamba.config import ModelConfig
from protomamba.kernels import DrawnClasses, Sample, draw_classes
from protomamba.kernels.prototype_loss import places, total_weight, valid_tokens
from protomamba.kernels.rows import gather_rows
from protomamba.model.heads import proposals, sampling
from protomamba.model.heads.base import Head

# Targets that share a sample: many, so that a product is worth its start; few, so that what a sample happens to hold
# is not what all tokens of a step are held against.
GROUP = 512
# Runs of a group at most, whose rows have chances of their own.
RUNS = 16
# Of more classes than these a part is looked at for each group: what a step costs must not grow with their number.
CANDIDATES = 16_384

SampledLoss = Callable[..., Tensor]


class _Part(NamedTuple):
    """A group's tokens, and where what is drawn for them comes from."""

    runs: list[sampling.Run]
    features_TD: Tensor
    targets_T: Tensor
    generator: torch.Generator


class SamplingHead(Head):
    """Base of our heads that sample: they set `sample`, say in `samples_classes` whether they do, and ask for the
    buffers (`count_draws`, `count_classes`), which are in checkpoints.

    A token is held against classes that its group takes for likely (`proposals`), of all or, where there are very many,
    of those of the batch and even ones.
    """

    # Whether the loss adds up the gradient of a dense table over all groups itself: it is given the table, not rows.
    whole_table = False
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

    @property
    def table(self) -> Tensor:
        """(V, D): a row for each class."""
        rows_VD: Tensor = getattr(self, str(self.row_table))
        return rows_VD

    def features(self, z_TD: Tensor) -> Tensor:
        """(T, D): what of z decides the logits; see `logits_of`."""
        raise NotImplementedError

    def logits_of(self, features_GKD: Tensor, rows_CD: Tensor) -> Tensor:
        """(G, K, C): the logits that training takes the softmax of, for rows of the table."""
        raise NotImplementedError

    def next_samples(self, z_BLD: Tensor, targets_BL: Tensor) -> list[Sample]:
        """A sample of the next forward pass for each GROUP of its targets; moves the counts on. All classes: none.

        z_BLD: (B, L, D) and targets_BL (B, L); or (T, D) and (T,) for rows of one.
        """
        shared, self._shared = self._shared, None
        if not self.samples_classes:
            return []
        key, shared_T = shared or (int(self.draws), targets_BL)
        self.draws.add_(1)
        shared_T = shared_T.reshape(-1)
        shared_T = shared_T[shared_T >= 0]
        self._count(shared_T)
        return self._samples(key, z_BLD, targets_BL, shared_T)

    def draw(self, key: int, z_BLD: Tensor, targets_BL: Tensor) -> list[Sample]:
        """`next_samples` of a step with these targets and no others: a function of the key, the frequencies, the table
        and z."""
        return self._samples(key, z_BLD, targets_BL, targets_BL[targets_BL >= 0])

    @torch.no_grad()
    def _samples(self, key: int, z_BLD: Tensor, targets_BL: Tensor, shared_T: Tensor) -> list[Sample]:
        rows_BL, common_U = targets_BL.reshape(len(targets_BL), -1), sampling.distinct(shared_T)
        even = sampling.even_draws(self.sample, len(common_U))
        # What lengths follow (`steadiness`) is to be the same on all ranks, whatever their own targets.
        kept, groups = min(1.0, (self.sample - even) / max(1, len(common_U))), math.ceil(len(shared_T) / GROUP)
        self._drawn = sampling.Drawing(len(shared_T), kept, even, self.classes, max(1, groups))
        z_TD, targets_T, _ = valid_tokens(z_BLD.reshape(-1, self.d_model), targets_BL.reshape(-1), None)
        features_TD = self.features(z_TD)
        runs_G, start = sampling.groups_of((rows_BL >= 0).sum(1).tolist(), GROUP, RUNS), 0
        parts = list[_Part]()
        for number, runs in enumerate(runs_G):
            inside = slice(start, start := start + sum(run.tokens for run in runs))
            generator = torch.Generator().manual_seed(sampling.key_of_group(key, number))
            parts.append(_Part(runs, features_TD[inside].float(), targets_T[inside], generator))
        if self.classes > CANDIDATES:
            return [self._sample_of_many(part, self._drawn, rows_BL, common_U) for part in parts]
        found = self._chosen(parts, self.table, [part.targets_T for part in parts])
        return [
            Sample(classes_S, log_chance_S.float()[None], (len(part.targets_T),))
            for part, (classes_S, log_chance_S) in zip(parts, found, strict=True)
        ]

    def _sample_of_many(self, part: _Part, drawing: sampling.Drawing, targets_BL: Tensor, common_U: Tensor) -> Sample:
        """One group's sample where there are very many classes: of CANDIDATES at most, the batch's and even ones.

        What is in a run's rows is known with its features: it was sure to be a candidate.
        """
        own_R = [targets_BL[run.rows.start : run.rows.stop] for run in part.runs]
        own_R = [own_BL[own_BL >= 0] for own_BL in own_R]
        own_U = sampling.distinct(torch.cat(own_R))
        candidates = sampling.draw(part.generator, own_U, common_U, self.classes, CANDIDATES)
        own_K = places(candidates.classes_S, own_U)
        rows_CD = self.table.index_select(0, candidates.classes_S)
        ((place_S, log_chance_S),) = self._chosen([part], rows_CD, [own_K[own_K >= 0]])
        classes_S, tokens_R = candidates.classes_S[place_S], [len(own_T) for own_T in own_R]
        chances = sampling.Chances(classes_S, self._shares(self.counts[classes_S]), drawing, candidates, sum(tokens_R))
        log_chance_RS = chances.of_runs(tokens_R, own_R) + log_chance_S
        return Sample(classes_S, log_chance_RS.float(), tuple(run.tokens for run in part.runs))

    def _chosen(self, parts: Sequence[_Part], rows_CD: Tensor, own: Sequence[Tensor]) -> list[DrawnClasses]:
        """Of candidates, whose rows these are, what each group is held against: their places, rising, and the logs of
        their chances, float64. own: the places of those that are certain, where there is room."""
        means = [proposals.centroids(part.features_TD, part.generator) for part in parts]
        centroid_GKD, tokens_GK = torch.stack([each for each, _ in means]), torch.stack([each for _, each in means])
        logits_GKC = self.logits_of(centroid_GKD, rows_CD.detach().float())
        rooms = [proposals.room(len(part.targets_T), self.sample) for part in parts]
        start_G = torch.cat([torch.rand(1, generator=part.generator, dtype=torch.float64) for part in parts])
        return draw_classes(logits_GKC, tokens_GK, own, rooms, start_G)

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

    def sampled_loss(self, op: SampledLoss, z_BLD: Tensor, targets_BL: Tensor, weight_T: Tensor | None) -> Tensor:
        """op(z, rows, targets, samples, weights), the mean over all targets, with this step's samples: see
        `kernels.reference.grouped_prototype_loss`; none for all classes.

        The op gets the whole table where that is dense and there is one sample or it wants that, else the rows (R, D)
        that targets and samples need, their numbers standing for places in them.
        """
        samples, table_VD = self.next_samples(z_BLD, targets_BL), self.table
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
