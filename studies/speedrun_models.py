"""What the speed run compares with: a nanoGPT-like transformer and an LSTM over bytes, in plain torch.

The settings are the best of the few that were tried at 20 to 40 seconds; each may be given on the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

BYTES = 257  # and the end of a document
Settings = dict[str, float]

TRANSFORMER: Settings = {"width": 128, "layers": 2, "heads": 4, "lr": 2e-3, "decay": 0.1, "batch": 4, "length": 128}
LSTM: Settings = {"width": 128, "layers": 1, "lr": 8e-3, "decay": 0.01, "batch": 8, "length": 128}


class Layer(nn.Module):
    """Pre-norm attention and a GELU map of four times the width (Karpathy's nanoGPT, without dropout)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.out = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        batch, length, width = x_BLD.shape
        heads = self.qkv(self.norm_1(x_BLD)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_BLD = x_BLD + self.out(y.transpose(1, 2).reshape(batch, length, width))
        return x_BLD + self.down(F.gelu(self.up(self.norm_2(x_BLD))))


class Transformer(nn.Module):
    """Logits (B, L, BYTES) of the next bytes; learnt positions, the embedding tied to the head."""

    def __init__(self, width: int, layers: int, heads: int, length: int) -> None:
        super().__init__()
        self.table, self.places = nn.Embedding(BYTES, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Layer(width, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(width, bias=False)
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(
                    p, std=0.02 / ((2 * layers) ** 0.5 if name.endswith(("out.weight", "down.weight")) else 1)
                )

    def forward(self, ids_BL: Tensor) -> Tensor:
        x_BLD = self.table(ids_BL) + self.places.weight[: ids_BL.shape[1]]
        return F.linear(self.norm(self.layers(x_BLD)), self.table.weight)


class Lstm(nn.Module):
    """Logits (B, L, BYTES) of the next bytes, by torch's LSTM."""

    def __init__(self, width: int, layers: int) -> None:
        super().__init__()
        self.table = nn.Embedding(BYTES, width)
        self.lstm = nn.LSTM(width, width, layers, batch_first=True)
        self.head = nn.Linear(width, BYTES)

    def forward(self, ids_BL: Tensor) -> Tensor:
        return self.head(self.lstm(self.table(ids_BL))[0])  # type: ignore[no-any-return]


def build(kind: str, settings: Settings) -> tuple[nn.Module, Callable[[float], Callable[[Tensor, Tensor], None]]]:
    """The model, and what makes a training step at a rate: AdamW, gradients clipped at 1."""
    sizes = {name: int(settings[name]) for name in ("width", "layers")}
    model: nn.Module = (
        Transformer(**sizes, heads=int(settings["heads"]), length=int(settings["length"]))
        if kind == "transformer"
        else Lstm(**sizes)
    )
    matrices, vectors = ([p for p in model.parameters() if (p.ndim > 1) is wide] for wide in (True, False))
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, weight_decay=settings["decay"], betas=(0.9, 0.99), fused=True)

    def at(rate: float) -> Callable[[Tensor, Tensor], None]:
        for group in optimizer.param_groups:
            group["lr"] = rate
        return lambda tokens_BL, targets_BL: step(model, optimizer, tokens_BL, targets_BL)

    return model, at


def step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BL: Tensor, targets_BL: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(tokens_BL).flatten(0, 1), targets_BL.flatten()).backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()


@torch.no_grad()
def nats(model: nn.Module, tokens_BL: Tensor, targets_BL: Tensor, length: int) -> float:
    """The mean cross entropy of a batch, in windows of the length the model was trained on."""
    pairs = zip(tokens_BL.split(length, 1), targets_BL.split(length, 1), strict=True)
    losses = [F.cross_entropy(model(x).flatten(0, 1), y.flatten(), reduction="sum") for x, y in pairs]
    return float(sum(losses)) / targets_BL.numel()
