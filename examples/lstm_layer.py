"""A layer of one's own: an LSTM in place of the Mamba block, without touching the package.

    protomamba train --layer examples.lstm_layer:LSTMLayer --layer-option hidden=64 ...

The model puts a norm before the layer and a residual around it; the layer mixes positions and carries its state.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn

from protomamba import PLAIN_CALL, ForwardContext, Mixer, MixerOutput, ModelConfig, Schema

Carried = tuple[Tensor, ...]


class LSTMLayer(Mixer):
    """One LSTM and an output matrix. Growing starts from `out_proj` = 0, as the base class expects."""

    class Config(Schema):
        hidden: int | None = Field(None, ge=1, description="width of the LSTM; auto = d_model")

    options: Config

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        hidden = self.options.hidden or config.d_model
        self.lstm = nn.LSTM(config.d_model, hidden, batch_first=True)
        self.out_proj = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x_BLD: Tensor, ctx: ForwardContext = PLAIN_CALL) -> MixerOutput:
        if ctx.reset_BL is None or not bool(ctx.reset_BL.any()):
            return MixerOutput(*self._run(x_BLD, ctx.state))
        # Documents begin inside the rows: run position by position and drop the state where one does.
        outputs, state = [], ctx.state
        for position in range(x_BLD.shape[1]):
            if state is not None:
                keep_B1 = ~ctx.reset_BL[:, position, None]
                state = (state[0] * keep_B1, state[1] * keep_B1)
            y_B1D, state = self._run(x_BLD[:, position : position + 1], state)
            outputs.append(y_B1D)
        return MixerOutput(torch.cat(outputs, dim=1), state)

    def _run(self, x_BLD: Tensor, state: Carried | None) -> tuple[Tensor, Carried]:
        # States have the batch first, so that sequences can be batched together; nn.LSTM wants (1, B, D).
        held = None if state is None else (state[0][None], state[1][None])
        y_BLD, (h_1BD, c_1BD) = self.lstm(x_BLD, held)
        return self.out_proj(y_BLD), (h_1BD[0], c_1BD[0])
