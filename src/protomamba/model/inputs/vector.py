"""Real-valued inputs: a vector of C channels a position, some of which may be missing."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.errors import ConfigError
from protomamba.model.inputs.base import Input, input_part
from protomamba.schema import Schema


@input_part("vector")
class VectorInput(Input):
    """x = W [v, m] + b, with v the values, NaN taken as 0, and m = 1 where a value is missing (NaN), else 0.

    A missing value has a learned vector of its own, so that it is not mistaken for a 0. Values are best standardised.
    """

    class Config(Schema):
        channels: int | None = Field(None, ge=1, le=1_048_576, description="values C per position")

    options: Config

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        if self.options.channels is None:
            raise ConfigError(
                "--input vector: the number of values per position is missing; give --input-option channels=C"
            )
        self.proj = nn.Linear(2 * self.options.channels, config.d_model)

    def forward(self, inputs: Tensor) -> Tensor:
        """Floating (..., C), NaN for missing -> (..., D)."""
        missing = torch.isnan(inputs)
        values = torch.cat([inputs.masked_fill(missing, 0.0), missing.to(inputs.dtype)], dim=-1)
        x: Tensor = self.proj(values.to(self.proj.weight.dtype))
        return x

    def expected(self) -> str:
        return f"floating values (B, L, {self.options.channels})"
