"""Softmax over inner products, for comparison and for interchange."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from protomamba.config import ModelConfig, TieFields
from protomamba.errors import ConfigError
from protomamba.kernels import LogitProjection, sampled_softmax_loss, softmax_loss
from protomamba.model.heads.base import Evaluation, head, inner_products, valid_positions
from protomamba.model.heads.many import MANY, judged_part
from protomamba.model.heads.sampling_head import SamplingHead, mean_of_groups


@head("softmax")
class SoftmaxHead(SamplingHead):
    """logits = z W^T, cross entropy in blocks. W starts as published: torch's default for a linear layer.

    With `sample` a token is held against that many classes at most in training, drawn and corrected for as the
    prototype head's are (Jean et al. 2015, arXiv 1412.2007): O(sample D) a token. Evaluation looks at all.
    """

    class Config(TieFields):
        sample: int = Field(
            0,
            ge=0,
            le=16_777_216,
            description="softmax head: most classes that a token is held against in training; 0 = all",
        )

    options: Config
    row_table = "weight"
    weight: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        bound = self.d_model**-0.5
        self.weight = nn.Parameter(torch.empty(self.classes, self.d_model).uniform_(-bound, bound))
        self.sample = self.options.sample
        if self.sample:
            self.count_draws()
            self.count_classes()

    @property
    def samples_classes(self) -> bool:
        return 0 < self.sample < self.classes

    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        targets_T = targets_BL.reshape(-1)
        weight_T = self.target_weights(targets_T)
        if not (self.samples_classes and self.training and torch.is_grad_enabled()):
            self.forget_step()
            z_TD, precision = z_BLD.reshape(-1, self.d_model), self.precision if self.training else "fp32"
            return softmax_loss(z_TD, self.weight, targets_T, weight_T, precision=precision)
        return self.sampled_loss(self._sampled, z_BLD, targets_BL, weight_T)

    def _sampled(self, *given: Any) -> Tensor:
        return mean_of_groups(partial(sampled_softmax_loss, precision=self.precision), *given)

    def features(self, z_TD: Tensor) -> Tensor:
        return z_TD

    def logits_of(self, features_GKD: Tensor, rows_CD: Tensor) -> Tensor:
        return inner_products(features_GKD, rows_CD)

    def scores(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): the logits."""
        return inner_products(z_BLD, self.weight)

    def class_scores(self, z_TD: Tensor, start: int, stop: int) -> Tensor:
        return inner_products(z_TD, self.weight[start:stop])

    def own_logits(self, z_TD: Tensor, targets_T: Tensor) -> Tensor | None:
        return (z_TD * self.weight[targets_T]).sum(-1) if type(self) is SoftmaxHead else None

    @torch.no_grad()
    def evaluate(self, z_BLD: Tensor, targets_BL: Tensor, exact: bool = True) -> Evaluation:
        """See `Head`. Over very many classes the loss, which is the cross entropy that is judged, is that of the judged
        targets: all logits once more would be as dear again."""
        if self.classes < MANY or type(self) is not SoftmaxHead:
            return super().evaluate(z_BLD, targets_BL, exact)
        z_TD, targets_T = valid_positions(z_BLD, targets_BL)
        part = torch.arange(len(targets_T)) if exact else judged_part(len(targets_T), self.classes)
        correct, likelihood = self._judge(z_TD[part], targets_T[part])
        loss = -(likelihood or 0.0) * len(targets_T) / max(1, len(part))
        return Evaluation(loss, correct, len(targets_T), likelihood, None if exact else len(part))

    def logit_projection(self) -> LogitProjection | None:
        return LogitProjection(self.weight.detach(), unit=False, scale=1.0) if type(self) is SoftmaxHead else None

    def tie_weights(self, weight_VD: nn.Parameter) -> None:
        """Use `weight_VD` (V, D) instead of an own matrix. Raises ConfigError where the classes are not the tokens."""
        if weight_VD.shape != self.weight.shape:
            raise ConfigError(
                f"--tie-embedding: the embedding has {len(weight_VD):,} rows, the head {self.classes:,} classes; "
                "they must agree"
            )
        self.weight = weight_VD
