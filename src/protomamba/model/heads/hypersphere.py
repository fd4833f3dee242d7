"""Hyperspherical prototypes: every class is a direction."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.kernels import LogitProjection, prototype_loss, reference, separated_prototype_loss
from protomamba.model.heads import prototypes
from protomamba.model.heads.base import Head, inner_products, valid_positions

# Targets that the scale is fitted on at most: one number needs no more.
FIT_TARGETS = 4_096


class HyperspherePrototypes(Head):
    """Hyperspherical prototypes (Mettes, van der Pol & Snoek 2019, arXiv 1901.10514): every class is a direction.

        loss = mean over targets y of (1 - cos(z, p_y))^2        prediction = argmax_k cos(z, p_k)

    `fixed` prototypes are placed apart once and never move: O(D) a token, whatever V is. `learned` ones start there,
    and `separation` times a second term keeps them and z apart from wrong classes, of which SAMPLE are drawn each step:
    O(SAMPLE * D) a token, whatever V is. Without it all prototypes drift together, and the loss falls to 0 with them.
    The term acts through its gradient: the loss that is returned, and shown, is the formula above.
    """

    SAMPLE = 512
    SHARPNESS = 20.0

    prototypes: Tensor
    scale: Tensor
    draws: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        placed_VD = prototypes.place(self.classes, self.d_model)
        self.learned = config.prototypes == "learned"
        self.separation = config.separation if self.learned and self.classes > 1 else 0.0
        if self.learned:
            self.prototypes = nn.Parameter(placed_VD)
            # How many samples were drawn: the next is a function of it, so that a resumed run draws the same ones.
            self.register_buffer("draws", torch.zeros((), dtype=torch.int64))
        else:
            self.register_buffer("prototypes", placed_VD)
        # Before `calibrate`: the fixed scale of AdaCos (Zhang et al. 2019, arXiv 1905.00292).
        self.register_buffer("scale", torch.tensor(math.sqrt(2) * math.log(max(2, self.classes - 1))))

    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        z_TD, targets_T = z_BLD.reshape(-1, self.d_model), targets_BL.reshape(-1)
        wanted_T = targets_T[targets_T >= 0]
        if not (self.training and self.separation > 0 and torch.is_grad_enabled() and len(wanted_T)):
            return prototype_loss(z_TD, self.prototypes, targets_T)
        sample_S, log_chance_S = self._sample(wanted_T)
        return separated_prototype_loss(
            z_TD, self.prototypes, targets_T, sample_S, log_chance_S, sharpness=self.SHARPNESS, weight=self.separation
        )

    def crowding(self, z_TD: Tensor, targets_T: Tensor) -> Tensor:
        """The term itself: see `kernels.reference.crowding`. Every call draws the next sample."""
        return reference.crowding(z_TD, self.prototypes, targets_T, *self._sample(targets_T), self.SHARPNESS)

    def scores(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): the cosine of z to each prototype."""
        prototypes_VD = self._unit_prototypes()
        return inner_products(F.normalize(z_BLD, dim=-1), prototypes_VD)

    def _unit_prototypes(self) -> Tensor:
        """(V, D) of unit length."""
        return F.normalize(self.prototypes, dim=-1) if self.learned else self.prototypes

    def logits(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): scale * cosine."""
        return self.scale * self.scores(z_BLD)

    def logit_projection(self) -> LogitProjection | None:
        # A class derived from this one may score in its own way.
        own = type(self) is HyperspherePrototypes
        return LogitProjection(self._unit_prototypes().detach(), unit=True, scale=float(self.scale)) if own else None

    @torch.no_grad()
    def post_step(self) -> None:
        """Back to unit length: gradients are tangential, so each update makes a prototype longer and slower to turn."""
        if self.learned and self.prototypes.requires_grad:
            self.prototypes.div_(torch.linalg.vector_norm(self.prototypes, dim=-1, keepdim=True).clamp_min(1e-12))

    def diagnostics(self) -> dict[str, float]:
        """nearest_cosine: the mean cosine of a prototype to its nearest neighbour, over 1,024 of them."""
        return {"nearest_cosine": float(prototypes.nearest_cosines(self.prototypes, 1_024).mean())}

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set `scale` to the s that maximises the likelihood of softmax(s cos) on the first FIT_TARGETS targets."""
        z_TD, targets_T = _first_targets(batches, FIT_TARGETS)
        if not len(targets_T) or not bool(torch.isfinite(z_TD).all()):
            return
        low, high, s = 1e-3, 1e5, float(self.scale)
        for _ in range(60):
            slope, curvature = self._slope(z_TD, targets_T, s)
            low, high = (s, high) if slope > 0 else (low, s)
            newton = s - slope / curvature if curvature < 0 else high
            step_to = newton if low < newton < high else math.sqrt(low * high)
            if abs(step_to - s) < 1e-4 * s:
                break
            s = step_to
        self.scale.fill_(s)

    def _slope(self, z_TD: Tensor, targets_T: Tensor, s: float) -> tuple[float, float]:
        """First and second derivative in s of sum_t (s cos_ty - log sum_k exp(s cos_tk)): concave, so one maximum."""
        slope = curvature = 0.0
        for z_RD, targets_R in zip(self.blocks(z_TD), self.blocks(targets_T), strict=True):
            cosine_RV = self.scores(z_RD)
            weight_RV = (s * cosine_RV).softmax(-1)
            mean_R = (weight_RV * cosine_RV).sum(-1)
            slope += float((cosine_RV.gather(-1, targets_R[:, None])[:, 0] - mean_R).sum(dtype=torch.float64))
            curvature -= float((weight_RV * (cosine_RV - mean_R[:, None]).square()).sum(dtype=torch.float64))
        return slope, curvature

    def _sample(self, targets_T: Tensor) -> tuple[Tensor, Tensor]:
        """Classes (S,), sorted, and the log of each one's chance to be among them; all classes if SAMPLE suffice.

        Half are drawn evenly, half as often as they occur in the batch: common classes are most often the wrong ones.
        """
        if self.classes <= self.SAMPLE:
            return torch.arange(self.classes), torch.zeros(self.classes, dtype=self.prototypes.dtype)
        generator = torch.Generator().manual_seed(int(self.draws))
        self.draws.add_(1)
        half = self.SAMPLE // 2
        even_S = torch.randint(self.classes, (half,), generator=generator)
        common_S = targets_T[torch.randint(len(targets_T), (half,), generator=generator)]
        sample_S = torch.unique(torch.cat([even_S, common_S]))
        share_S = torch.bincount(targets_T, minlength=self.classes)[sample_S].to(self.prototypes.dtype) / len(targets_T)
        log_missed_S = half * (math.log1p(-1 / self.classes) + torch.log1p(-share_S))
        return sample_S, torch.log(-torch.expm1(log_missed_S))


def _first_targets(batches: Iterable[tuple[Tensor, Tensor]], limit: int) -> tuple[Tensor, Tensor]:
    """The first `limit` positions whose target counts, over all batches."""
    zs, targets, left = [], [], limit
    for z_BLD, targets_BL in batches:
        z_TD, targets_T = valid_positions(z_BLD, targets_BL)
        zs.append(z_TD[:left])
        targets.append(targets_T[:left])
        left -= len(targets[-1])
        if left <= 0:
            break
    return (torch.cat(zs), torch.cat(targets)) if zs else (torch.empty(0), torch.empty(0, dtype=torch.long))
