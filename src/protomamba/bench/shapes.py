"""What is timed: a batch, a model around it, and a trainer of each kind."""

from __future__ import annotations

import re
from dataclasses import dataclass

from torch import Tensor

from protomamba.bench.child import batch
from protomamba.config import ModelConfig, TrainConfig
from protomamba.errors import ConfigError
from protomamba.model.mixers import mixer
from protomamba.model.sequence_model import SequenceModel
from protomamba.schema import nearest
from protomamba.train.trainer import Trainer

VOCABULARY = 8_192
NEVER = 1_000_000_000
_PATTERN = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)(:(\w+))?")


@dataclass(frozen=True)
class Shape:
    """`batch` rows of `length` tokens through `layers` blocks of width `d_model`."""

    name: str
    batch: int
    length: int
    d_model: int
    layers: int
    layer: str = "mamba"
    classes: int | None = None

    @property
    def vocab_size(self) -> int:
        return self.classes or VOCABULARY

    @property
    def tokens(self) -> int:
        return self.batch * self.length

    @property
    def text(self) -> str:
        kind = "" if self.layer == "mamba" else f", {self.layer}"
        kind += f", V {self.classes}" if self.classes else ""
        return f"{self.name}: {self.batch} x {self.length}, {self.d_model}, {self.layers}{kind}"

    def config(self) -> ModelConfig:
        return ModelConfig(vocab_size=self.vocab_size, d_model=self.d_model, n_layer=self.layers, layer=self.layer)

    def batches(self) -> tuple[Tensor, Tensor]:
        """Tokens and the targets after them, (B, L) each, with the frequencies of text: the same ones each time."""
        return batch(self.batch, self.length, self.vocab_size)


NAMED = {
    shape.name: shape
    for shape in (
        Shape("S", 8, 256, 128, 2),
        Shape("M", 8, 64, 512, 6),
        Shape("L", 2, 1024, 512, 6),
        Shape("one-row", 1, 2048, 512, 6),
        Shape("compact", 8, 64, 512, 2, "compact"),
        Shape("demo", 8, 256, 128, 2, classes=256),
    )
}


def parse_shapes(text: str) -> list[Shape]:
    """Names and BxLxDxLAYERS[:KIND], with commas between. ConfigError for anything else."""
    return [_parse(word.strip()) for word in text.split(",")]


def _parse(word: str) -> Shape:
    if word in NAMED:
        return NAMED[word]
    match = _PATTERN.fullmatch(word)
    kinds = {None, *mixer.classes}
    if match is None or match.group(6) not in kinds or not all(int(size) for size in match.groups()[:4]):
        raise ConfigError(
            f"--shapes {word!r}: expected {', '.join(NAMED)} or BATCHxLENGTHxWIDTHxLAYERS{nearest(word, NAMED)}"
        )
    batch, length, d_model, layers = (int(size) for size in match.groups()[:4])
    return Shape(word, batch, length, d_model, layers, match.group(6) or "mamba")


def build(shape: Shape, precision: str) -> tuple[Trainer, Trainer]:
    """Two trainers of one model: backpropagation, clipped on every step, and AdamW; local updates of D alone."""
    model = SequenceModel(shape.config(), seed=0)
    full = TrainConfig(bp_cadence_steps=1, ff_lr=0.0, grad_clip_norm=1e-3, steps=NEVER, precision=precision)
    local = TrainConfig(bp_cadence_steps=NEVER, grad_clip_norm=1e-3, steps=NEVER, precision=precision)
    return Trainer(model, full), Trainer(model, local)
