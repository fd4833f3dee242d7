"""Small untrained models as checkpoints: what they answer is arbitrary, and the same each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from protomamba import ModelConfig, SequenceModel, TrainConfig, Trainer
from protomamba.checkpoint import file as checkpoint
from protomamba.data.tokenizer import ByteTokenizer

SMALL: dict[str, Any] = {"d_model": 16, "d_state": 4, "n_layer": 2}


def model(**changes: Any) -> SequenceModel:
    return SequenceModel(ModelConfig(**{"vocab_size": 40, "head": "softmax", **SMALL, **changes}), seed=1)


def saved(folder: Path, tokenizer: bool = False, **changes: Any) -> Path:
    """The checkpoint of such a model, of text if it has a tokenizer."""
    trainer = Trainer(model(**{**({"vocab_size": 257} if tokenizer else {}), **changes}), TrainConfig())
    path = folder / "latest.safetensors"
    told = {"tokenizer": ByteTokenizer().to_json()} if tokenizer else {}
    checkpoint.save(path, trainer.parts(), config={**trainer.configs(), **told})
    return path


def sequences(count: int, longest: int = 40, vocab: int = 40) -> list[list[int]]:
    """Lengths from 1 to `longest`, in no order."""
    return [[(7 * i + 3 * j * j) % vocab for j in range(1 + (11 * i) % longest)] for i in range(count)]
