"""A layer of one's own: an LSTM in place of the Mamba block, without touching the package.

    protomamba train --layer examples.lstm_layer:LSTMLayer ...

The model puts a norm before the layer and a residual around it; the layer mixes positions and carries its state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from protomamba import Layer, ModelConfig

State = tuple[Tensor, ...]


class LSTMLayer(Layer):
    """One LSTM of width D and an output matrix. Growing starts from `out_proj` = 0, as the base class expects."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.lstm = nn.LSTM(config.d_model, config.d_model, batch_first=True)
        self.out_proj = nn.Linear(config.d_model, config.d_model, bias=False)

    def forward(self, x_BLD: Tensor, state: State | None, reset_BL: Tensor | None) -> tuple[Tensor, State]:
        if reset_BL is None or not bool(reset_BL.any()):
            return self._run(x_BLD, state)
        # Documents begin inside the rows: run position by position and drop the state where one does.
        outputs = []
        for position in range(x_BLD.shape[1]):
            if state is not None:
                keep_B1 = ~reset_BL[:, position, None]
                state = (state[0] * keep_B1, state[1] * keep_B1)
            y_B1D, state = self._run(x_BLD[:, position : position + 1], state)
            outputs.append(y_B1D)
        assert state is not None
        return torch.cat(outputs, dim=1), state

    def _run(self, x_BLD: Tensor, state: State | None) -> tuple[Tensor, State]:
        # States have the batch first, so that sequences can be batched together; nn.LSTM wants (1, B, D).
        held = None if state is None else (state[0][None], state[1][None])
        y_BLD, (h_1BD, c_1BD) = self.lstm(x_BLD, held)
        return self.out_proj(y_BLD), (h_1BD[0], c_1BD[0])
