"""Tokens: one row of a table for each."""

from __future__ import annotations

from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.model.inputs.base import Input, input_part


@input_part("tokens")
class TokenEmbedding(Input, nn.Embedding):
    """x = weight[tokens]; the table (V, D) starts with deviation 0.02."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, num_embeddings=config.vocab_size, embedding_dim=config.d_model)
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, inputs: Tensor) -> Tensor:
        """int64 (...) -> (..., D)."""
        return nn.Embedding.forward(self, inputs)

    def expected(self) -> str:
        return "int64 tokens (B, L)"
