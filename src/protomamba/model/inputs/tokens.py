"""Tokens: one row of a table for each."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from protomamba.config import ModelConfig
from protomamba.kernels.rows import gather_rows, unique_rows
from protomamba.model.inputs.base import Input, input_part


@input_part("tokens")
class TokenEmbedding(Input, nn.Embedding):
    """x = weight[tokens]; the table (V, D) starts with deviation 0.02."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, num_embeddings=config.vocab_size, embedding_dim=config.d_model)
        nn.init.normal_(self.weight, std=0.02)

    row_table = "weight"

    def forward(self, inputs: Tensor) -> Tensor:
        """int64 (...) -> (..., D)."""
        if self.row_sparse and torch.is_grad_enabled():
            rows_R, places = unique_rows(inputs)
            return nn.functional.embedding(places, gather_rows(self.weight, rows_R))
        try:
            return nn.Embedding.forward(self, inputs)
        except IndexError as error:
            lowest, highest = int(inputs.min()), int(inputs.max())
            raise IndexError(
                f"tokens from {lowest} to {highest}: expected 0 to {self.num_embeddings - 1} (vocab_size)"
            ) from error

    def expected(self) -> str:
        return "int64 tokens (B, L)"
