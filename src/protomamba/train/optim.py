"""AdamW over named parameters, its groups by one rule, and the learning rate as a pure function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from protomamba import kernels
from protomamba.config import TrainFields

MOMENTS = ("step", "exp_avg", "exp_avg_sq")
LARGEST_NORM = math.sqrt(torch.finfo(torch.float32).max)


def decays(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to A_log (a rate) nor prototypes (only directions count).

    Biases, norms and D are vectors.
    """
    return parameter.ndim >= 2 and name.rpartition(".")[2] not in ("A_log", "prototypes")


# The share of a schedule that warms up where no number of steps is given.
WARMUP_SHARE = 0.02


def warmup_steps(total: int, config: TrainFields) -> int:
    """Steps of linear warm-up in a schedule over `total`."""
    given = config.lr_warmup_steps
    return min(total, math.ceil(WARMUP_SHARE * total) if given is None else given)


def learning_rate(step: int, total: int, config: TrainFields) -> float:
    """The rate of update `step` (from 0) of `total`: linear warm-up, then cosine from lr to lr_min_scale * lr."""
    warmup = warmup_steps(total, config)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup - 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
    return config.lr * (config.lr_min_scale + (1 - config.lr_min_scale) * cosine)


class Optimizer:
    """torch's fused AdamW whose state is kept by parameter name, so that it survives growing and freezing.

    scales: factors on the learning rate of single parameters, by name.
    """

    def __init__(self, model: nn.Module, config: TrainFields, scales: Mapping[str, float]) -> None:
        self.named = {name: p for name, p in model.named_parameters() if p.requires_grad}
        self._adamw: torch.optim.AdamW | None = None
        if self.named:
            self._adamw = torch.optim.AdamW(
                self._groups(config, scales),
                lr=config.lr,
                betas=(config.beta1, config.beta2),
                eps=config.adam_eps,
                fused=True,
            )

    def _groups(self, config: TrainFields, scales: Mapping[str, float]) -> list[dict[str, Any]]:
        groups: dict[tuple[bool, float], list[Tensor]] = {}
        for name, parameter in self.named.items():
            groups.setdefault((decays(name, parameter), scales.get(name, 1.0)), []).append(parameter)
        return [
            {"params": parameters, "weight_decay": config.weight_decay if decay else 0.0, "scale": scale}
            for (decay, scale), parameters in groups.items()
        ]

    def zero_grad(self) -> None:
        for parameter in self.named.values():
            parameter.grad = None

    def gradients(self) -> dict[str, Tensor]:
        """The gradients of the last backward pass by parameter name; parameters it did not reach are missing."""
        return {name: p.grad for name, p in self.named.items() if p.grad is not None}

    def update(self, lr: float, shrink: float = 1.0) -> None:
        """One AdamW update at rate `lr` with every gradient multiplied by `shrink` (clipping)."""
        if self._adamw is None:
            return
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["scale"]
        divisor = None
        if shrink != 1.0 and all(p.dtype == torch.float32 for p in self.named.values()):
            # The fused step divides the gradients by this on its way: a pass over them less than scaling them before.
            divisor = torch.tensor(1.0 / shrink, dtype=torch.float32)
        elif shrink != 1.0:
            torch._foreach_mul_(list(self.gradients().values()), shrink)  # the fused divisor is a float32
        self._adamw.grad_scale = divisor  # type: ignore[attr-defined]
        self._adamw.step()

    def moments(self) -> dict[str, dict[str, Tensor]]:
        """The state of each parameter that has been updated: step (count), exp_avg, exp_avg_sq."""
        if self._adamw is None:
            return {}
        state = self._adamw.state
        return {name: {k: state[p][k] for k in MOMENTS} for name, p in self.named.items() if p in state}

    def bytes_to_come(self) -> int:
        """How much larger the state gets once every parameter has been updated."""
        fresh = [p for p in self.named.values() if self._adamw is not None and p not in self._adamw.state]
        return sum(2 * p.numel() * p.element_size() + torch.float32.itemsize for p in fresh)

    def load_moments(self, moments: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over moments by name; names that are not trained here are left out. ValueError for another shape."""
        for name, parameter in self.named.items():
            if self._adamw is not None and name in moments:
                shape = moments[name]["exp_avg"].shape
                if shape != parameter.shape:
                    # torch's fused update would read and write beyond the smaller of the two.
                    raise ValueError(
                        f"{name}: moments of shape {tuple(shape)} for a parameter of {tuple(parameter.shape)}"
                    )
                self._adamw.state[parameter] = {k: moments[name][k].clone() for k in MOMENTS}

    def state_dict(self) -> dict[str, Any]:
        return {"moments": self.moments()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.load_moments(state["moments"])


def total_norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm of all gradients together; NaN or Inf if any element is. 0 without gradients.

    Inf too where the squares are beyond float32, as they would be in AdamW's second moment.
    """
    norm = math.sqrt(sum(kernels.square_sums(list(gradients))))
    return math.inf if norm > LARGEST_NORM else norm


def first_non_finite(tensors: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor with a NaN or Inf in it, or None. One pass over their memory."""
    sums = kernels.square_sums(list(tensors.values()))
    return next((name for name, squares in zip(tensors, sums, strict=True) if not math.isfinite(squares)), None)
