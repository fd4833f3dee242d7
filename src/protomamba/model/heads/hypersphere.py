"""Hyperspherical prototypes: every class is a direction."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from protomamba.config import ModelConfig, PrototypeFields
from protomamba.kernels import (
    LogitProjection,
    Sample,
    grouped_prototype_loss,
    keep_lengths,
    prototype_loss,
    reference,
    separated_prototype_loss,
)
from protomamba.model.heads import prototypes
from protomamba.model.heads.base import head, inner_products, valid_positions
from protomamba.model.heads.many import MANY, class_blocks
from protomamba.model.heads.sampling_head import SamplingHead

# Targets that the scale is fitted on at most: one number needs no more.
FIT_TARGETS = 4_096
# The learnt sharpness never falls below: on a long plateau it would fall for ever, and have to come back all the way.
LEAST_SHARPNESS = 0.5
FIT_SCORES = 67_108_864  # and cosines that this may take
SINCE_0_1 = (
    "since 0.2 learned prototypes follow cross entropy over s cos(z, p) with s learnt, "
    "where 0.1 added a term of fixed sharpness to (1 - cos)^2"
)


@head("hpn")
class HyperspherePrototypes(SamplingHead):
    """Hyperspherical prototypes (Mettes, van der Pol & Snoek 2019, arXiv 1901.10514): every class is a direction.

        loss = mean over targets y of (1 - cos(z, p_y))^2        prediction = argmax_k cos(z, p_k)

    `fixed` prototypes are placed apart once and never move: O(D) a token, whatever V is. `learned` ones start there.
    The loss alone would pull all of them to one place, so their gradient, and z's, is another: that of the cross
    entropy over s cos(z, p_k), s = exp(log_scale) learnt, from at most `sample` classes: O(sample D) a token.
    The value that is returned, and shown, is the formula above (docs/decisions/011). With `separation` 0 learned
    prototypes have the loss alone for their gradient too, and collapse.
    """

    class Config(PrototypeFields):
        sample: int = Field(
            1_024,
            ge=2,
            le=16_777_216,
            description="most classes that a token is held against in training, with learned prototypes",
        )

    options: Config
    row_table = "prototypes"
    whole_table = True
    prototypes: Tensor
    log_scale: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        placed_VD = prototypes.place(self.classes, self.d_model)
        self.sample = self.options.sample
        self.learned = self.options.prototypes == "learned"
        self.contrastive = self.learned and self.options.separation > 0 and self.classes > 1
        # Before anything is learnt or fitted: the fixed scale of AdaCos (Zhang et al. 2019, arXiv 1905.00292).
        self._first_sharpness = start = math.sqrt(2) * math.log(max(2, self.classes - 1))
        if self.learned:
            self.prototypes = nn.Parameter(placed_VD)
            self.count_draws()
        else:
            self.register_buffer("prototypes", placed_VD)
        self.register_buffer("scale", torch.tensor(start))
        if self.contrastive:
            self.log_scale = nn.Parameter(torch.tensor(math.log(start)))
            self.register_buffer("fitted", torch.zeros((), dtype=torch.bool))
            self.count_classes()

    def forward(self, z_BLD: Tensor, targets_BL: Tensor) -> Tensor:
        targets_T = targets_BL.reshape(-1)
        weight_T = self.target_weights(targets_T)
        if not (self.contrastive and self.training and torch.is_grad_enabled()):
            self.forget_step()
            return prototype_loss(z_BLD.reshape(-1, self.d_model), self.prototypes, targets_T, weight_T)
        return self.sampled_loss(self._separated, z_BLD, targets_BL, weight_T)

    def _separated(
        self, z_TD: Tensor, rows_RD: Tensor, targets_T: Tensor, samples: list[Sample], weight_T: Tensor | None
    ) -> Tensor:
        given = z_TD, rows_RD, self.log_scale, targets_T
        if samples:
            return grouped_prototype_loss(*given, samples, weight_T, self.precision)
        return separated_prototype_loss(*given, weight_T=weight_T, precision=self.precision)

    @property
    def samples_classes(self) -> bool:
        return self.contrastive and self.classes > self.sample

    def features(self, z_TD: Tensor) -> Tensor:
        return F.normalize(z_TD, dim=-1)

    def logits_of(self, features_GKD: Tensor, rows_CD: Tensor) -> Tensor:
        return self._cosines(features_GKD * self.log_scale.exp(), rows_CD)

    def cross_entropy(self, z_TD: Tensor, targets_T: Tensor, sample: Sample | None = None) -> Tensor:
        """What learned prototypes follow the gradient of, in nats, over targets (T,), all >= 0, and a sample for them,
        all classes without one: see `kernels.reference.sampled_cross_entropy`."""
        given = () if sample is None else (sample.classes_S, sample.log_chance_TS())
        return reference.sampled_cross_entropy(z_TD, self.prototypes, self.log_scale, targets_T, *given)

    def scores(self, z_BLD: Tensor) -> Tensor:
        """(B, L, V): the cosine of z to each prototype."""
        prototypes_VD = self._unit_prototypes()
        return inner_products(F.normalize(z_BLD, dim=-1), prototypes_VD)

    def class_scores(self, z_TD: Tensor, start: int, stop: int) -> Tensor:
        return self._cosines(F.normalize(z_TD, dim=-1), self.prototypes[start:stop])

    def _cosines(self, directions_TD: Tensor, rows_CD: Tensor) -> Tensor:
        """(T, C): of directions, (..., T, D) of unit length, to prototypes; longer ones have as much larger scores."""
        cosine_TC = inner_products(directions_TD, rows_CD)
        # The lengths divide the scores, which are fewer than what a copy of the rows would have.
        return cosine_TC / torch.linalg.vector_norm(rows_CD, dim=-1).clamp_min(1e-12) if self.learned else cosine_TC

    def own_logits(self, z_TD: Tensor, targets_T: Tensor) -> Tensor | None:
        if type(self) is not HyperspherePrototypes:
            return None
        return self.scale * (F.normalize(z_TD, dim=-1) * F.normalize(self.prototypes[targets_T], dim=-1)).sum(-1)

    def temperature(self) -> float:
        return float(self.scale)

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
    def post_step(self, rows_R: Tensor | None = None) -> None:
        """Back to their lengths: gradients are tangential, so each update makes a prototype longer and slower to turn.

        That is `length`, and where classes are sampled times the `sampling.steadiness` of the class: Adam's steps are
        as much shorter, and a shorter prototype turns more.
        """
        if self.contrastive and self.log_scale.requires_grad:
            self.log_scale.clamp_(min=math.log(LEAST_SHARPNESS))
        if self.learned and self.prototypes.requires_grad and rows_R is not None:
            keep_lengths(self.prototypes, self.length(), rows_R=rows_R)
        elif self.learned and self.prototypes.requires_grad and not self.row_sparse:
            keep_lengths(self.prototypes, self.length(), self.steadiness() if self.samples_classes else None)
        if self.contrastive and not self.fitted:
            self.scale.copy_(self.log_scale.exp())

    def length(self) -> float:
        """1, and more where the sharpness has fallen below the one it began with.

        Adam's steps are as long for noise as for a signal. Where there is nothing to learn yet the sharpness falls, and
        with it what a prototype's gradient says; a longer prototype turns less in a step, in the same proportion.
        """
        return max(1.0, self._first_sharpness / float(self.log_scale.detach().exp())) if self.contrastive else 1.0

    def diagnostics(self) -> dict[str, float]:
        """nearest_cosine: the mean cosine of a prototype to its nearest neighbour, over 1,024 (fewer where there
        are very many); random_cosine: what as many random directions would have."""
        sample = min(1_024, max(16, FIT_SCORES // self.classes))
        return {
            "nearest_cosine": float(prototypes.nearest_cosines(self.prototypes, sample).mean()),
            "random_cosine": prototypes.random_nearest_cosine(self.classes, self.d_model),
        }

    @torch.no_grad()
    def calibrate(self, batches: Iterable[tuple[Tensor, Tensor]]) -> None:
        """Set `scale` to the s that maximises the likelihood of softmax(s cos) on the first FIT_TARGETS targets."""
        limit = min(FIT_TARGETS, max(1, FIT_SCORES // self.classes))
        z_TD, targets_T = _first_targets(batches, limit)
        if not len(targets_T) or not bool(torch.isfinite(z_TD).all()):
            return
        cosine_TV = self._all_by_blocks(z_TD) if self.classes >= MANY else None
        low, high, s = 1e-3, 1e5, float(self.scale)
        for _ in range(60):
            slope, curvature = self._slope(z_TD, targets_T, s, cosine_TV)
            low, high = (s, high) if slope > 0 else (low, s)
            newton = s - slope / curvature if curvature < 0 else high
            step_to = newton if low < newton < high else math.sqrt(low * high)
            if abs(step_to - s) < 1e-4 * s:
                break
            s = step_to
        self.scale.fill_(s)
        if self.contrastive:
            self.fitted.fill_(True)

    def _all_by_blocks(self, z_TD: Tensor) -> Tensor:
        """(T, V): `scores`, without a copy of the table."""
        blocks = class_blocks(len(z_TD), self.classes)
        return torch.cat([self.class_scores(z_TD, start, stop) for start, stop in blocks], 1)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Weights without a learnt sharpness (of 0.1, or of other prototypes) start it at their fitted scale."""
        if self.contrastive and f"{prefix}log_scale" not in state_dict and f"{prefix}scale" in state_dict:
            scale = state_dict[f"{prefix}scale"]
            state_dict[f"{prefix}log_scale"] = scale.log()
            state_dict[f"{prefix}fitted"] = torch.ones_like(self.fitted)
            for name in ("counts", "counted", "told"):
                state_dict[f"{prefix}{name}"] = torch.zeros_like(getattr(self, name))
            self.notes.append(
                f"head.log_scale starts at log {float(scale):.4g}, the fitted scale of the weights: {SINCE_0_1}"
            )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _slope(self, z_TD: Tensor, targets_T: Tensor, s: float, cosine_TV: Tensor | None = None) -> tuple[float, float]:
        """First and second derivative in s of sum_t (s cos_ty - log sum_k exp(s cos_tk)): concave, so one maximum.

        cosine_TV: the cosines, where they are few enough targets to be held.
        """
        slope = curvature = 0.0
        held = self.blocks(z_TD if cosine_TV is None else cosine_TV)
        for block_R, targets_R in zip(held, self.blocks(targets_T), strict=True):
            cosine_RV = self.scores(block_R) if cosine_TV is None else block_R
            weight_RV = (s * cosine_RV).softmax(-1)
            mean_R = (weight_RV * cosine_RV).sum(-1)
            slope += float((cosine_RV.gather(-1, targets_R[:, None])[:, 0] - mean_R).sum(dtype=torch.float64))
            curvature -= float((weight_RV * (cosine_RV - mean_R[:, None]).square()).sum(dtype=torch.float64))
        return slope, curvature


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
