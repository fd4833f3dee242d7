"""Weights that a run starts from: a checkpoint's, or those of a transformers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import LATEST
from protomamba.config import ArchitectureFields, HeadFields, ModelConfig, RunConfig
from protomamba.errors import ConfigError, UserError
from protomamba.model.pretrained import read_weights
from protomamba.model.registry import merged_options, refuse_unnamed_parts
from protomamba.model.sequence_model import SequenceModel
from protomamba.schema import flag


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from: a model shape, its tensors by our names, and the moments of a checkpoint that grows."""

    source: Path
    model: ModelConfig
    state: dict[str, Tensor]
    moments: dict[str, Any]


def read_initial_weights(path: Path) -> InitialWeights:
    """A protomamba checkpoint, a folder of weights alone, or one of transformers' Mamba. Raises UserError."""
    if not path.exists():
        raise UserError(f"--init-from {path}: there is no such checkpoint or folder")
    if path.is_dir() and not (path / LATEST).is_file():
        fields, state = read_weights(path)
        return InitialWeights(path, ModelConfig(**fields), state, {})
    loaded = checkpoint.load(path / LATEST if path.is_dir() else path)
    moments = loaded.parts.get("optimizer", {}).get("moments", {})
    return InitialWeights(path, ModelConfig(**loaded.config["model"]), loaded.parts["model"], moments)


def adapt_to_weights(config: RunConfig, weights: InitialWeights) -> RunConfig:
    """The run's configuration with the shape that `weights` have; ConfigError where a given flag contradicts it.

    The head is the run's own. Without --target-layers the model does not grow.
    """
    given, model = config.given, weights.model
    refuse_unnamed_parts(model.replace(head="hpn"))  # the head is the run's own
    target = config.target_layers if "target_layers" in given else model.n_layer
    shape = {name: getattr(model, name) for name in ArchitectureFields.model_fields if name not in _OF_THE_RUN}
    shape |= {"vocab_size": model.vocab_size, "base_layers": model.n_layer}
    if "layers" in given:  # by final place, and perhaps with kinds that are new: compared kind by kind
        del shape["layer"], shape["layers"]
    shape["layer_options"] = merged_options(model.layer_options, config.layer_options)
    wrong = [
        f"{flag(name)}: the weights have {value}, given {getattr(config, name)}"
        for name, value in shape.items()
        if name in given - {"layer_options"} and getattr(config, name) != value
    ]
    if wrong:
        raise ConfigError(f"--init-from {weights.source}: contradicts the flags given:\n  " + "\n  ".join(wrong))
    return config.replace(**shape, target_layers=target)


# What weights do not decide: their head, and how the run regularises.
_OF_THE_RUN = {*HeadFields.model_fields, "dropout", "layer_options"}


def load_weights(model: SequenceModel, weights: InitialWeights) -> tuple[list[str], dict[str, Any]]:
    """Loads what fits; what the user should know about it, and the moments of what was loaded."""
    _refuse_other_settings(model.config, weights)
    same_head = weights.model.head == model.config.head and weights.model.classes == model.config.classes
    if same_head and model.config.tie_embedding and not weights.model.tie_embedding:
        raise ConfigError(f"--tie-embedding 1: {weights.source} has an embedding and a head of its own; leave it out")
    state, moments = (
        {k: v for k, v in each.items() if same_head or not k.startswith("head.")}
        for each in (weights.state, weights.moments)
    )
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in (*missing, *unexpected) if not name.startswith("head.")]
    if lost:
        raise UserError(f"{weights.source}: does not fit the model: {', '.join(lost[:5])}")
    notes = [f"weights from {weights.source} ({weights.model.n_layer} layers)"]
    if not same_head:
        notes.append(f"its {weights.model.head} head is left out: the {model.config.head} head starts from scratch")
    return notes, moments


def refuse_other_kinds(model: ModelConfig, weights: InitialWeights) -> None:
    """ConfigError where a layer of the model is not of the weights' kind."""
    kinds, held = model.kinds(model.n_layer), weights.model.kinds(weights.model.n_layer)
    if kinds != held:
        raise ConfigError(
            f"--layers: {weights.source} has {','.join(held)}, and the places they come to are for {','.join(kinds)}"
        )


def _refuse_other_settings(model: ModelConfig, weights: InitialWeights) -> None:
    """ConfigError where layers of one kind have other settings than those of the weights."""
    for kind, values in weights.model.layer_options.items():
        for key, value in values.items():
            found = model.layer_options.get(kind, {}).get(key, value)
            if found != value:
                raise ConfigError(f"--layer-option {kind}.{key}: {weights.source} has {value}, given {found}")
