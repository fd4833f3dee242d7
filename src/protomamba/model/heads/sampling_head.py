"""A head whose training step looks at a sample of its classes: how often each comes, and which are drawn next."""

from __future__ import annotations

import torch
from torch import Tensor

from protomamba.config import ModelConfig
from protomamba.kernels.rows import gather_rows
from protomamba.model.heads import sampling
from protomamba.model.heads.base import Head


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

    def next_sample(self, targets_T: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """The sample of the next forward pass; moves the counts on. All classes: (None, None)."""
        shared, self._shared = self._shared, None
        if not self.samples_classes:
            return None, None
        key, shared_T = shared or (int(self.draws), targets_T)
        self.draws.add_(1)
        wanted_T = shared_T.reshape(-1)
        wanted_T = wanted_T[wanted_T >= 0]
        self._count(wanted_T)
        return self.draw(key, wanted_T)

    def draw(self, key: int, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (S,), in rising order, and the log of each one's chance to be among them: a function of the key,
        of the targets (T,), all >= 0, and of the frequencies."""
        common_U = torch.unique(targets_T)
        sample_S, kept = sampling.draw(key, common_U, self.classes, self.sample)
        share_S = (self.counts[sample_S] + 0.5) / (self.counted + 0.5 * self.classes)
        even = sampling.even_draws(self.sample, len(common_U))
        return sample_S, sampling.log_chances(share_S, len(targets_T), kept, even, self.classes).float()

    def _count(self, targets_T: Tensor) -> None:
        if not self.told:
            self.counts.index_add_(0, targets_T, torch.ones_like(targets_T))
            self.counted.add_(len(targets_T))

    def rows_read(
        self, table_VD: Tensor, targets_T: Tensor, sample_S: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """What of a row-sparse table a step reads: the rows (R, D) of targets and sample alone, and where in them those
        are (targets below 0 stay so). A dense table, or all of its classes: as they are."""
        if not self.row_sparse or sample_S is None:
            return table_VD, targets_T, sample_S
        wanted_T = targets_T >= 0
        rows_R = torch.unique(torch.cat([sample_S, targets_T[wanted_T]]))
        places_T = torch.where(wanted_T, torch.searchsorted(rows_R, targets_T.clamp_min(0)), targets_T)
        return gather_rows(table_VD, rows_R), places_T, torch.searchsorted(rows_R, sample_S)
