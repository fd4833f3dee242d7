"""The interface of a head, which turns z into a loss and into predictions, for our heads and for user-defined ones.

A head sees z (..., D) and targets (...), of any leading shape: (B, L, D) for a class per token, (B, D) for one per row.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.errors import ConfigError
from protomamba.kernels import LogitProjection, product
from protomamba.model.heads.many import BLOCK_SCORES, MANY, Judged, judge, judged_part
from protomamba.model.registry import Part, Registry


@dataclass(frozen=True)
class Evaluation:
    """Sums over targets >= 0, so that batches add up. log_likelihood_sum is in nats, None without probabilities.

    `correct` and `log_likelihood_sum` are over `judged` of the targets; None: over all.
    """

    loss_sum: float
    correct: int
    count: int
    log_likelihood_sum: float | None
    judged: int | None = None

    @property
    def judgements(self) -> int:
        return self.count if self.judged is None else self.judged

    @property
    def accuracy(self) -> float:
        return self.correct / max(1, self.judgements)


class Head(Part, ABC):
    """Base of every head, including your own: define `forward` and `scores`. Constructed as `Class(config)`.

    Take rows of a parameter by `index_select` or `F.embedding`: with several threads the gradient of plain indexing
    adds up in any order, and your own training loop would not resume to the bit.

    Use a head of your own by name: `--head package.module:Class`. A forward hook on a head sees the loss, in training
    and evaluation only; predictions call `scores` and `logits` directly (hook the model's `norm_f` to see z).
    """

    FIELD = "head_options"

    class_weights: Tensor | None
    # Of a training step's matrix products, fp32 or bf16: that of the model.
    precision = "fp32"

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.d_model = config.d_model
        self.classes = config.classes
        # What loading weights changed that the user should know, one line each.
        self.notes: list[str] = []
        self.register_buffer("class_weights", None)

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
        """(B, V) from which the next token is chosen: `logits`, or `scores` if there are none."""
        logits_B1V = self.logits(z_BD[:, None])
        return (self.scores(z_BD[:, None]) if logits_B1V is None else logits_B1V)[:, 0]

    def logit_projection(self) -> LogitProjection | None:
        """How `logits` come from z by one matrix, for decoding in one call; None where they come in another way."""
        return None

    def begin_step(self, key: int, targets_T: Tensor) -> None:
        """Called before each forward pass of training that several ranks share: `targets_T` are those of all ranks, in
        their order, `key` (>= 0) tells the pass from every other. A head that draws anything draws it from these."""

    @property
    def samples_classes(self) -> bool:
        """Whether training looks at a sample of the classes only, and corrects for how often each is drawn."""
        return False

    def set_frequencies(self, counts_V: Tensor) -> None:
        """How often each class is a target in the data (V,), int64, for a head that samples classes."""

    def set_class_weights(self, weight_V: Tensor) -> None:
        """What a target of each class counts in training (V,), >= 0: the loss becomes the weighted mean. Kept in the
        checkpoint; evaluation stays unweighted. Raises ConfigError for invalid weights."""
        fits = weight_V.shape == (self.classes,) and bool(torch.isfinite(weight_V).all() and (weight_V >= 0).all())
        if not fits or not bool(weight_V.any()):
            raise ConfigError(
                f"class weights: expected {self.classes:,} finite numbers >= 0, not all of them 0, got shape "
                f"{tuple(weight_V.shape)} from {float(weight_V.min()):g} to {float(weight_V.max()):g}"
            )
        self.class_weights = weight_V.detach().float().clone()

    def target_weights(self, targets_T: Tensor) -> Tensor | None:
        """(T,): the class weight of each target during training; None if all count equally."""
        if self.class_weights is None or not self.training:
            return None
        return self.class_weights.index_select(0, targets_T.clamp_min(0))

    def weight_of(self, targets_BL: Tensor) -> float:
        """The weight of these targets in a mean over several batches: their number, or the sum of their weights."""
        wanted_T = targets_BL[targets_BL >= 0]
        weight_T = self.target_weights(wanted_T)
        return float(len(wanted_T)) if weight_T is None else float(weight_T.double().sum())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        given_V = state_dict.get(f"{prefix}class_weights")
        if given_V is not None and self.class_weights is None:
            self.set_class_weights(given_V)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def tie_weights(self, weight_VD: nn.Parameter) -> None:
        """Share the embedding's matrix. Raises ConfigError where the head has no such matrix."""
        raise ConfigError(f"--tie-embedding: {type(self).__name__} cannot share the embedding; the softmax head can")

    def post_step(self, rows_R: Tensor | None = None) -> None:
        """Called after each update of the parameters."""

    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Calibrate `logits` on held-out (z, targets); the default does nothing."""

    def diagnostics(self) -> dict[str, float]:
        """Figures about the head for the log; a 'nearest_cosine' near 1 means that the prototypes have collapsed."""
        return {}

    @torch.no_grad()
    def predict(self, z_BLD: Tensor) -> Tensor:
        """int64 (B, L): the class of the highest score. In blocks: B L V is never kept."""
        many = self.best(z_BLD.reshape(-1, self.d_model)) if self.classes >= MANY else None
        if many is not None:
            return many.classes_Tk[:, 0].reshape(z_BLD.shape[:-1])
        found = [self.scores(z_TD).argmax(-1) for z_TD in self.blocks(z_BLD.reshape(-1, self.d_model))]
        return (
            torch.cat(found).reshape(z_BLD.shape[:-1]) if found else z_BLD.new_empty(z_BLD.shape[:-1], dtype=torch.long)
        )

    @torch.no_grad()
    def evaluate(self, z_BLD: Tensor, targets_BL: Tensor, exact: bool = True) -> Evaluation:
        """Loss, hits and log-likelihood over the targets >= 0. In blocks: B L V is never kept.

        exact: False judges hits and likelihood on a part of the targets where there are very many classes.
        """
        z_TD, targets_T = valid_positions(z_BLD, targets_BL)
        total = len(targets_T)
        loss = self._plain_loss(z_TD, targets_T) * total if total else 0.0
        if not exact:
            part = judged_part(total, self.classes)
            z_TD, targets_T = z_TD[part], targets_T[part]
        correct, likelihood = self._judge(z_TD, targets_T)
        return Evaluation(loss, correct, total, likelihood, None if exact else len(targets_T))

    def class_scores(self, z_TD: Tensor, start: int, stop: int) -> Tensor | None:
        """(T, stop - start): `scores` for the classes from start to stop alone; None where a head has them only all
        together."""
        return None

    def best(self, z_TD: Tensor, k: int = 1, factor: float = 1.0) -> Judged | None:
        """The k best classes of each row, in one pass over the classes; None without `class_scores`."""
        if not len(z_TD) or self.class_scores(z_TD[:1], 0, 1) is None:
            return None
        return judge(lambda a, b: cast(Tensor, self.class_scores(z_TD, a, b)), len(z_TD), self.classes, k, factor)

    def own_logits(self, z_TD: Tensor, targets_T: Tensor) -> Tensor | None:
        """(T,): the entry of `logits` of each token's own class; None where a head has them only all together."""
        return None

    def temperature(self) -> float:
        """What `logits` are of `scores`, for a head that has `own_logits`."""
        return 1.0

    def _judge(self, z_TD: Tensor, targets_T: Tensor) -> tuple[int, float | None]:
        """Hits and log-likelihood, None without probabilities."""
        own_T = self.own_logits(z_TD, targets_T) if self.classes >= MANY else None
        found = None if own_T is None else self.best(z_TD, factor=self.temperature())
        if own_T is not None and found is not None:
            likelihood = float((own_T - found.log_sum_T).sum(dtype=torch.float64))
            return int((found.classes_Tk[:, 0] == targets_T).sum()), likelihood
        correct, total, probabilistic = 0, 0.0, True
        for z_RD, targets_R in zip(self.blocks(z_TD), self.blocks(targets_T), strict=True):
            correct += int((self.scores(z_RD).argmax(-1) == targets_R).sum())
            logits_RV = self.logits(z_RD)
            probabilistic = logits_RV is not None
            if logits_RV is not None:
                total -= float(F.cross_entropy(logits_RV, targets_R, reduction="sum"))
        return correct, total if probabilistic else None

    def _plain_loss(self, z_TD: Tensor, targets_T: Tensor) -> float:
        """The loss as evaluation has it, whatever mode the head is in."""
        training = self.training
        self.eval()
        try:
            return float(self(z_TD, targets_T))
        finally:
            self.train(training)

    def blocks(self, items_T: Tensor) -> Iterator[Tensor]:
        """Rows so many at a time that their scores for all classes stay within BLOCK_SCORES."""
        if len(items_T):
            yield from torch.split(items_T, max(1, BLOCK_SCORES // self.classes))


head: Registry[Head] = Registry("head", Head)  # type: ignore[type-abstract]


def valid_positions(z_BLD: Tensor, targets_BL: Tensor) -> tuple[Tensor, Tensor]:
    """z (T, D) and targets (T,) of the positions whose target counts."""
    kept_BL = targets_BL >= 0
    return z_BLD[kept_BL], targets_BL[kept_BL]


def inner_products(z_BLD: Tensor, rows_VD: Tensor) -> Tensor:
    """(B, L, V) in the dtype of the rows: z's with each."""
    return product(z_BLD.reshape(-1, z_BLD.shape[-1]).to(rows_VD.dtype), rows_VD).view(*z_BLD.shape[:-1], -1)
