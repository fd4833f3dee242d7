"""A layer for runs of the tests: it draws random numbers, as dropout does, and can be fatal to one rank."""

from __future__ import annotations

import os
import random
import signal

import torch
from torch import Tensor, nn

from protomamba import ModelConfig
from protomamba.errors import UserError
from protomamba.model.mixers.base import ForwardContext, Mixer, MixerOutput


class Faulty(Mixer):
    """x W with half of it dropped. FAULT=KIND:RANK:N does KIND at training pass N of that rank, before any restart.

    FAULT=kills:SEED:N kills a random rank at a random pass, at the start and again after each of N - 1 restarts.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.weight = nn.Parameter(torch.eye(config.d_model) * 0.1)
        self.passes = 0

    def forward(self, x_BLD: Tensor, ctx: ForwardContext | None = None) -> MixerOutput:
        y_BLD = x_BLD @ self.weight
        if self.training and torch.is_grad_enabled():
            self.passes += 1
            y_BLD = y_BLD * (torch.rand_like(y_BLD) < 0.5)
            self._fail_if_due()
        return MixerOutput(y_BLD, ())

    def _fail_if_due(self) -> None:
        kind, rank, number = os.environ.get("FAULT", "none:0:0").split(":")
        if kind == "kills":
            self._kill_at_random(int(rank), int(number))
            return
        if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" or self.passes != int(number):
            return
        if kind == "none" or os.environ.get("RANK", "0") != rank:
            return
        if kind == "raise":
            raise UserError("Faulty: the test's own error")
        if kind == "memory":
            raise MemoryError("the test's own lack of memory")
        os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}[kind])

    def _kill_at_random(self, seed: int, kills: int) -> None:
        attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
        draw = random.Random(f"{seed} {attempt}")
        victim, number = draw.randrange(int(os.environ.get("WORLD_SIZE", "1"))), draw.randint(2, 7)
        if (
            attempt < kills
            and "WORLD_SIZE" in os.environ
            and (self.passes, os.environ["RANK"]) == (number, str(victim))
        ):
            os.kill(os.getpid(), signal.SIGKILL)


LAYER = f"{__name__}:{Faulty.__name__}"
