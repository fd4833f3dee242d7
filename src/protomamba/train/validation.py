"""Held-out figures: how a model does on batches that it is not trained on."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from protomamba.model.heads.base import valid_positions
from protomamba.model.heads.many import MANY
from protomamba.model.sequence_model import SequenceModel
from protomamba.train.passes import AnyBatch, micro_batch


@dataclass
class Validation:
    """Held-out figures: mean loss and accuracy (nearest prototype) over `targets`.

    nll: mean cross entropy in nats of the head's calibrated probabilities; None where it has none, or without a target.
    majority: the share of the most common target, which is the accuracy of always predicting it.
    best: whether it is the best of its run so far. more: further fields for its line in metrics.jsonl.
    bytes_per_token: of the raw text, where text was prepared; raw_unit: what that counts, a byte or a base of DNA.
    """

    loss: float
    accuracy: float
    nll: float | None
    targets: int
    majority: float = 0.0
    best: bool = False
    more: dict[str, Any] = field(default_factory=dict)
    bytes_per_token: float | None = None
    raw_unit: str = "byte"

    @property
    def bits_per_byte(self) -> float | None:
        """The cross entropy as bits a byte of the raw text; None where either is not known."""
        return bits_per_byte(self.nll, self.bytes_per_token)

    @property
    def perplexity(self) -> float | None:
        """exp(nll)."""
        return None if self.nll is None else math.exp(min(700.0, self.nll))

    def fields(self) -> dict[str, Any]:
        """Its fields in a line of metrics.jsonl."""
        return {
            "val_loss": self.loss,
            "val_nll": self.nll,
            "val_accuracy": self.accuracy,
            "majority_accuracy": self.majority,
            "val_perplexity": self.perplexity,
            "targets": self.targets,
            **({} if self.bits_per_byte is None else {f"val_bits_per_{self.raw_unit}": self.bits_per_byte}),
            "best": self.best,
            **self.more,
        }


def bits_per_byte(nll: float | None, bytes_per_token: float | None) -> float | None:
    """Cross entropy in nats a token as bits a byte of the raw text; None where either is not known."""
    if nll is None or not bytes_per_token:
        return None
    return nll / math.log(2) / bytes_per_token


class TargetCounts:
    """Counts of the targets."""

    def __init__(self) -> None:
        self._counts: Counter[int] = Counter()

    def add(self, targets_BL: Tensor) -> Tensor:
        classes, counts = torch.unique(targets_BL[targets_BL >= 0], return_counts=True)
        self._counts.update(dict(zip(classes.tolist(), counts.tolist(), strict=True)))
        return targets_BL

    @property
    def majority(self) -> int:
        """Occurrences of the most common target."""
        return max(self._counts.values(), default=0)


@torch.no_grad()
def evaluate(model: SequenceModel, batches: Iterable[AnyBatch], calibrate: bool, exact: bool) -> Validation:
    """`Trainer.evaluate` for a model: in evaluation mode; the previous mode is restored afterwards.

    Where only a part of the targets is judged, it is a part of those of all batches together: the table is read once.
    """
    was_training = model.training
    model.eval()
    try:
        features = (
            (model.features(inputs, reset_BL=reset)[0], targets) for inputs, targets, reset in map(micro_batch, batches)
        )
        if calibrate:
            held = list(features)
            model.head.calibrate(held)
            features = (pair for pair in held)
        if not exact and model.head.classes >= MANY:
            features = (pair for pair in [_together(features)])
        seen = TargetCounts()
        parts = [model.head.evaluate(z_BLD, seen.add(targets_BL), exact) for z_BLD, targets_BL in features]
    finally:
        model.train(was_training)
    count = max(1, sum(part.count for part in parts))
    judged = max(1, sum(part.judgements for part in parts))
    told = [part for part in parts if part.count]
    likelihoods = [part.log_likelihood_sum for part in told if part.log_likelihood_sum is not None]
    return Validation(
        loss=sum(part.loss_sum for part in parts) / count,
        accuracy=sum(part.correct for part in parts) / judged,
        # Rounding may leave a likelihood above 1; of nothing it is 0, not -0.
        nll=max(0.0 - sum(likelihoods) / judged, 0.0) if likelihoods else None,
        targets=sum(part.count for part in parts),
        majority=seen.majority / count,
    )


def _together(pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """z (T, D) and targets (T,) of what counts in all of them."""
    parts = [valid_positions(z_BLD, targets_BL) for z_BLD, targets_BL in pairs]
    return torch.cat([z_TD for z_TD, _ in parts]), torch.cat([targets_T for _, targets_T in parts])
