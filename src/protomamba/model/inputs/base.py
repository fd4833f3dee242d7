"""The interface of an input part, which turns a batch of inputs into the residual stream's first x (B, L, D)."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from protomamba.model.registry import Part, Registry


class Input(Part, ABC):
    """Base of every input part, including your own (`--input package.module:Class`). Constructed as `Class(config)`."""

    FIELD = "input_options"

    @abstractmethod
    def forward(self, inputs: Tensor) -> Tensor:
        """x (..., D) for inputs of any leading shape: (B, L) or (B, L, C) in a sequence, (B,) or (B, C) in a step."""

    def expected(self) -> str:
        """What a batch of inputs must be (type and shape), for error messages."""
        return "inputs (B, L, ...)"


input_part: Registry[Input] = Registry("input", Input)  # type: ignore[type-abstract]
