"""A head of one's own: contrastive learning (InfoNCE) against the other targets of the batch.

    PYTHONPATH=examples protomamba train --head contrastive_head:ContrastiveHead ...

Every class has a key e_k. A position's own key must win against the keys of other positions of the same batch:

    loss = mean over targets y of  -log( exp(c_y / t) / (exp(c_y / t) + sum_j exp(c_j / t)) ),   c_k = cos(z, e_k)

with j over NEGATIVES targets of the batch, so a step costs O(NEGATIVES * D) a token, whatever the number of classes
(van den Oord, Li & Vinyals 2018, arXiv 1807.03748). Negatives from the batch come as often as their classes occur, so
that c_k / t learns log p(k | z) / p(k) plus a constant; the head counts the classes as it goes, and its scores
add log p(k).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.model.heads.base import Head


class ContrastiveHead(Head):
    """Keys (V, D) on the sphere, trained against the targets of other positions of the batch."""

    NEGATIVES = 512
    TEMPERATURE = 0.1

    counts: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.keys = nn.Parameter(torch.randn(self.classes, self.d_model) * self.d_model**-0.5)
        # A buffer, so that a checkpoint carries it. It starts at 1: a class never seen keeps a finite score.
        self.register_buffer("counts", torch.ones(self.classes))

    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        """The InfoNCE loss, a scalar: the mean over targets >= 0; 0 without any."""
        valid_BL = targets_BL >= 0
        targets_T = targets_BL[valid_BL]
        if not len(targets_T):
            return z_BLD.sum() * 0.0
        if self.training:
            self.counts.index_add_(0, targets_T, torch.ones_like(targets_T, dtype=self.counts.dtype))
        z_TD = F.normalize(z_BLD[valid_BL].to(self.keys.dtype), dim=-1)
        own_T = (z_TD * F.normalize(self.keys.index_select(0, targets_T), dim=-1)).sum(-1)
        others_TS = z_TD @ F.normalize(self.keys[self._negatives(targets_T)], dim=-1).t()
        logits = torch.cat([own_T[:, None], others_TS], dim=1) / self.TEMPERATURE
        return (logits.logsumexp(1) - logits[:, 0]).mean()

    def scores(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): log p(k | z) but for a constant in k."""
        cosine_BLV = F.normalize(z_BLD.to(self.keys.dtype), dim=-1) @ F.normalize(self.keys, dim=-1).t()
        return cosine_BLV / self.TEMPERATURE + (self.counts / self.counts.sum()).log()

    def _negatives(self, targets_T: Tensor) -> Tensor:
        """(S,) targets of the batch, evenly spread over it: no random numbers, so a resumed run is the same run."""
        size = min(self.NEGATIVES, len(targets_T))
        return targets_T[torch.arange(size) * len(targets_T) // size]
