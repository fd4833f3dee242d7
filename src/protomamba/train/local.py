"""Forward-Forward local updates of each layer's skip weight D, and the surgery that combines them with backpropagation.

    h+ = mean over batch and time of u             h- = the same of u shifted by one in time, its sign flipped where
                                                        (t + channel) is odd
    goodness(h) = sum_i h_i / std(h) * D_i / |D|   loss = max(0, 1 - (goodness(h+) - goodness(h-)))

docs/local-updates.md says how the surgery methods differ from the papers they are named after.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from protomamba.config import TrainFields

STD_EPS = 1e-5


@dataclass
class LocalSignal:
    """The sums over one layer's activation u (B, L, E) that its local loss needs; micro-batches add up."""

    positive_E: Tensor
    negative_E: Tensor
    positions: int = 0


class LocalSignals:
    """Collects, during a forward pass, what the local loss of each layer needs: the model's `activation_hook`."""

    def __init__(self) -> None:
        self.layers: dict[int, LocalSignal] = {}

    def __call__(self, layer: int, u_BLE: Tensor) -> None:
        total_E, corrupted_E = activation_sums(u_BLE)
        signal = self.layers.setdefault(layer, LocalSignal(torch.zeros_like(total_E), torch.zeros_like(total_E)))
        signal.positive_E += total_E
        signal.negative_E += corrupted_E
        signal.positions += u_BLE.shape[0] * u_BLE.shape[1]

    def flat(self) -> Tensor:
        """All sums in one row, float64 (N,): rows of several shards can be added."""
        parts = [
            torch.cat(
                [
                    each.positive_E.double(),
                    each.negative_E.double(),
                    torch.tensor([each.positions], dtype=torch.float64),
                ]
            )
            for each in self.layers.values()
        ]
        return torch.cat(parts) if parts else torch.empty(0, dtype=torch.float64)

    def load_flat(self, sums_N: Tensor) -> None:
        """Replace the sums by those of a row as `flat` makes them."""
        start = 0
        for each in self.layers.values():
            width = len(each.positive_E)
            positive_E, negative_E, positions = torch.split(sums_N[start : start + 2 * width + 1], [width, width, 1])
            each.positive_E, each.negative_E = positive_E.to(each.positive_E), negative_E.to(each.negative_E)
            each.positions = int(positions)
            start += 2 * width + 1

    def gradient(self, layer: int, weight_E: Tensor) -> tuple[Tensor, float]:
        """The gradient (E,) of the layer's local loss with respect to its D, and that loss."""
        signal = self.layers[layer]
        return local_gradient(
            signal.positive_E / signal.positions, signal.negative_E / signal.positions, weight_E.detach()
        )


@torch.no_grad()
def activation_sums(u_BLE: Tensor) -> tuple[Tensor, Tensor]:
    """Sums over batch and time of u and of its corruption, (E,) each.

    The corruption at t is u at t - 1 (0 at the start), negated where t + channel is odd: but for the sign of a channel
    the sum over t < L - 1 of u with alternating signs. Both sums are one product with two rows of ones, which reads u
    once; torch's sums over every second position take up to 15 times as long.
    """
    u_BLE = u_BLE.to(torch.promote_types(u_BLE.dtype, torch.float32))
    weights_2L = u_BLE.new_ones(2, u_BLE.shape[1])
    weights_2L[1, 1::2] = -1.0
    weights_2L[1, -1] = 0.0
    total_E, corrupted_E = (weights_2L @ u_BLE).sum(0)
    corrupted_E[0::2].neg_()
    return total_E, corrupted_E


@torch.no_grad()
def local_gradient(positive_E: Tensor, negative_E: Tensor, weight_E: Tensor) -> tuple[Tensor, float]:
    """d loss / d weight (E,), exact including the derivative of 1/|weight|, and the loss."""
    weight_E = weight_E.to(torch.promote_types(weight_E.dtype, positive_E.dtype))
    length = torch.linalg.vector_norm(weight_E).clamp_min(1e-12)
    direction_E = weight_E / length
    contrast_E = _standardised(positive_E) - _standardised(negative_E)
    margin = torch.dot(contrast_E, direction_E)
    loss = float(torch.clamp_min(1 - margin, 0))
    if loss == 0.0:
        return torch.zeros_like(weight_E), loss
    return (margin * direction_E - contrast_E) / length, loss


def _standardised(h_E: Tensor) -> Tensor:
    return h_E / (h_E.std(unbiased=False) + STD_EPS)


@torch.no_grad()
def combine(local_E: Tensor, global_E: Tensor, config: TrainFields) -> tuple[Tensor, bool]:
    """The gradient of D (E,) from the local and the backpropagated one, and whether the two were in conflict.

    pcgrad and cagradstep take (a part of) the conflicting component out of the local gradient; gradnorm scales it up
    with the disagreement of the directions.
    """
    eps, dtype = config.gradient_surgery_epsilon, global_E.dtype
    wide = torch.promote_types(local_E.dtype, dtype)
    local_E, global_E = local_E.to(wide), global_E.to(wide)
    dot = torch.dot(local_E, global_E)
    conflict = bool(dot < 0)
    if config.gradient_surgery_method == "gradnorm":
        local_E = local_E * torch.exp(
            config.gradnorm_alpha * torch.linalg.vector_norm(_unit(local_E, eps) - _unit(global_E, eps))
        )
    elif conflict:
        strength = config.cagrad_lambda if config.gradient_surgery_method == "cagradstep" else 1.0
        local_E = local_E - strength * dot / (torch.dot(global_E, global_E) + eps) * global_E
    return (global_E + (config.ff_lr / config.lr) * local_E).to(dtype), conflict


def _unit(x_E: Tensor, eps: float) -> Tensor:
    length: Tensor = torch.linalg.vector_norm(x_E) + eps
    return x_E / length.clamp_min(torch.finfo(x_E.dtype).tiny)  # a zero without an epsilon has no direction
