"""An optimizer of one's own: momentum, kept by parameter name, saved and resumed like ours.

protomamba train --optimizer examples.sgd:SGD --optimizer-option momentum=0.95 --lr 0.1
"""

import torch
from pydantic import Field

from protomamba.schema import Schema
from protomamba.train.optim import OptimizerBase


class SGD(OptimizerBase):
    """v = momentum v + g;  w = w - lr v."""

    slots = ("velocity",)

    class Config(Schema):
        momentum: float = Field(0.9, ge=0, lt=1, description="share of the velocity that stays")

    @torch.no_grad()
    def step(self, lr, scale=1.0):
        for name, parameter in self.named.items():
            if parameter.grad is None:
                continue
            slots = self._state.setdefault(name, {"velocity": torch.zeros_like(parameter)})
            slots["velocity"].mul_(self.config.momentum).add_(parameter.grad, alpha=scale)
            parameter.sub_(slots["velocity"], alpha=lr)
