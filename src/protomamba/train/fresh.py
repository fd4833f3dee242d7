"""A new run's trainer: the model built, loaded with given weights, grown and frozen as the flags say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from protomamba.config import ModelConfig, TrainConfig
from protomamba.errors import ConfigError
from protomamba.model.growth import base_pattern
from protomamba.model.sequence_model import SequenceModel
from protomamba.run_config import RunConfig
from protomamba.schema import flag
from protomamba.train.comm import Comm
from protomamba.train.initial_weights import InitialWeights, load_weights, refuse_other_kinds
from protomamba.train.outer import trainer_class
from protomamba.train.trainer import Trainer, renamed_layers


def base_shape(config: RunConfig, vocab_size: int) -> ModelConfig:
    """The model before it grows: --layers counts final places, so each layer is of the kind of its own."""
    layers = config.layers and base_pattern(config.layers, config.placement, config.base_layers, config.final_layers)
    shape: ModelConfig = config.project(ModelConfig, vocab_size=vocab_size, n_layer=config.base_layers, layers=layers)
    return shape


def fresh_trainer(
    config: RunConfig, vocab_size: int, weights: InitialWeights | None, comm: Comm | None = None
) -> tuple[Trainer, list[str]]:
    """Build, load, grow and freeze as the flags say; the second value is what the user should know about it."""
    with _naming_the_default(config, "placement", "append"):
        shape = base_shape(config, vocab_size)
    if weights:
        refuse_other_kinds(shape, weights)
    model = SequenceModel(shape, seed=config.seed)
    notes, moments = load_weights(model, weights) if weights else ([], {})
    origins: list[int | None] = list(range(config.base_layers))
    if config.final_layers != config.base_layers:
        with _naming_the_default(config, "placement", "append"):
            origins = model.grow(config.final_layers, config.placement, config.seed + 1, config.layers)
    with _naming_the_default(config, "freeze", "none"):
        model.freeze(config.freeze, config.freeze_embedding)
    trainer = trainer_class(config)(model, config.project(TrainConfig), comm)
    if moments and not config.sync_every and config.final_layers != config.base_layers:
        trainer.load_slots(renamed_layers(moments, origins))
        notes.append("the old layers keep their optimizer moments; the new ones start with none")
    return trainer, notes


@contextmanager
def _naming_the_default(config: RunConfig, name: str, instead: str) -> Iterator[None]:
    """An error about a value that is the documented default, which the user need not have given, says so."""
    try:
        yield
    except ConfigError as error:
        if getattr(config, name) != RunConfig.default(name):
            raise
        raise ConfigError(f"{error}; that is the default: give {flag(name)} {instead}, or another value") from None
