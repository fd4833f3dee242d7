"""What a head is: what turns z into a loss and into predictions, for our heads and for a user's own.

A head sees z (..., D) and targets (...), of any leading shape: (B, L, D) for a class per token, (B, D) for one per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.errors import ConfigError
from protomamba.kernels import LogitProjection, product

# Scores held at once in predict, evaluate and calibrate: 16 MiB of float32.
BLOCK_SCORES = 4_194_304


@dataclass(frozen=True)
class Evaluation:
    """Sums over targets >= 0, so that batches add up. log_likelihood_sum is in nats, None without probabilities."""

    loss_sum: float
    correct: int
    count: int
    log_likelihood_sum: float | None

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.count)


class Head(nn.Module, ABC):
    """Base of every head, also of a user's own: `forward` and `scores` suffice. Constructed as `Class(config)`.

    Take rows of a parameter by `index_select` or `F.embedding`: with several threads the gradient of plain indexing
    adds up in any order, and a loop of one's own would not resume to the bit.

    A head of the user's goes in by name: `--head package.module:Class`.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.d_model = config.d_model
        self.classes = config.classes

    @abstractmethod
    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """The loss, a scalar: the mean over targets >= 0 (int64, below `classes`); 0 without any."""

    @abstractmethod
    def scores(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): higher is likelier."""

    def logits(self, z_BLD: Tensor) -> Tensor | None:
        """(B, L, V) whose softmax is a calibrated probability, for sampling and perplexity; None if there is none."""
        return self.scores(z_BLD)

    def next_logits(self, z_BD: Tensor) -> Tensor:
        """(B, V) to choose the next token by: `logits`, or `scores` where there are none."""
        logits_B1V = self.logits(z_BD[:, None])
        return (self.scores(z_BD[:, None]) if logits_B1V is None else logits_B1V)[:, 0]

    def logit_projection(self) -> LogitProjection | None:
        """How `logits` come from z by one matrix, for decoding in one call; None where they come in another way."""
        return None

    def tie_weights(self, weight_VD: nn.Parameter) -> None:
        """Share the embedding's matrix. Raises ConfigError where the head has no such matrix."""
        raise ConfigError(f"--tie-embedding: {type(self).__name__} cannot share the embedding; the softmax head can")

    def post_step(self) -> None:
        """Called after each update of the parameters."""

    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Calibrate `logits` on held-out (z, targets); a head that needs none ignores it."""

    def diagnostics(self) -> dict[str, float]:
        """Figures about the head worth watching; 'nearest_cosine' near 1 is a collapse of the prototypes."""
        return {}

    @torch.no_grad()
    def predict(self, z_BLD: Tensor) -> Tensor:
        """int64 (B, L): the class of the highest score. In blocks: B L V is never kept."""
        found = [self.scores(z_TD).argmax(-1) for z_TD in self.blocks(z_BLD.reshape(-1, self.d_model))]
        return (
            torch.cat(found).reshape(z_BLD.shape[:-1]) if found else z_BLD.new_empty(z_BLD.shape[:-1], dtype=torch.long)
        )

    @torch.no_grad()
    def evaluate(self, z_BLD: Tensor, targets_BL: Tensor) -> Evaluation:
        """Loss, hits and log-likelihood over the targets >= 0. In blocks: B L V is never kept."""
        z_TD, targets_T = valid_positions(z_BLD, targets_BL)
        loss = float(self(z_TD, targets_T)) if len(targets_T) else 0.0
        correct, likelihood, probabilistic = 0, 0.0, True
        for z_RD, targets_R in zip(self.blocks(z_TD), self.blocks(targets_T), strict=True):
            correct += int((self.scores(z_RD).argmax(-1) == targets_R).sum())
            logits_RV = self.logits(z_RD)
            probabilistic = logits_RV is not None
            if logits_RV is not None:
                likelihood -= float(F.cross_entropy(logits_RV, targets_R, reduction="sum"))
        return Evaluation(loss * len(targets_T), correct, len(targets_T), likelihood if probabilistic else None)

    def blocks(self, items_T: Tensor) -> Iterator[Tensor]:
        """Rows so many at a time that their scores for all classes stay within BLOCK_SCORES."""
        if len(items_T):
            yield from torch.split(items_T, max(1, BLOCK_SCORES // self.classes))


def valid_positions(z_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """z (T, D) and targets (T,) of the positions whose target counts."""
    kept_BL = targets_BL >= 0
    return z_BLD[kept_BL], targets_BL[kept_BL]


def inner_products(z_BLD: Tensor, rows_VD: Tensor) -> Tensor:
    """(B, L, V) in the dtype of the rows: z's with each."""
    return product(z_BLD.reshape(-1, z_BLD.shape[-1]).to(rows_VD.dtype), rows_VD).view(*z_BLD.shape[:-1], -1)
