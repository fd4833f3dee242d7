"""What turns inputs into the residual stream. Importing this registers all of ours."""

from __future__ import annotations

from protomamba.model.inputs.base import Input, input_part
from protomamba.model.inputs.tokens import TokenEmbedding
from protomamba.model.inputs.vector import VectorInput

__all__ = ["Input", "TokenEmbedding", "VectorInput", "input_part"]
