"""Softmax over inner products, for comparison and for interchange."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from protomamba.config import ModelConfig, TieFields
from protomamba.errors import ConfigError
from protomamba.kernels import LogitProjection, softmax_loss
from protomamba.model.heads.base import Head, head, inner_products


@head("softmax")
class SoftmaxHead(Head):
    """logits = z W^T, cross entropy in blocks. W starts as published: torch's default for a linear layer."""

    class Config(TieFields):
        """tie_embedding."""

    options: Config
    weight: nn.Parameter

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        bound = self.d_model**-0.5
        self.weight = nn.Parameter(torch.empty(self.classes, self.d_model).uniform_(-bound, bound))

    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        targets_T = targets_BL.reshape(-1)
        return softmax_loss(z_BLD.reshape(-1, self.d_model), self.weight, targets_T, self.target_weights(targets_T))

    def scores(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): the logits."""
        return inner_products(z_BLD, self.weight)

    def class_scores(self, z_TD: Tensor, start: int, stop: int) -> Tensor:
        return inner_products(z_TD, self.weight[start:stop])

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
