"""Weights that a run starts from: a checkpoint's, or those of a transformers folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import LATEST
from protomamba.config import ArchitectureFields, HeadFields, ModelConfig
from protomamba.data.vocabulary import Vocabulary
from protomamba.errors import ConfigError, UserError
from protomamba.model.pretrained import read_weights
from protomamba.model.registry import merged_options, refuse_unnamed_parts
from protomamba.model.sequence_model import SequenceModel
from protomamba.run_config import RunConfig
from protomamba.schema import flag
from protomamba.words import counted


@dataclass(frozen=True)
class InitialWeights:
    """Weights to start from: a model shape, its tensors by our names, and the moments of a checkpoint that grows.

    vocabulary: the names of its items, where it has such.
    """

    source: Path
    model: ModelConfig
    state: dict[str, Tensor]
    moments: dict[str, Any]
    vocabulary: Vocabulary | None = None


def read_initial_weights(path: Path) -> InitialWeights:
    """A protomamba checkpoint, a folder of weights alone, or one of transformers' Mamba. Raises UserError."""
    if not path.exists():
        raise UserError(f"--init-from {path}: there is no such checkpoint or folder")
    if path.is_dir() and not (path / LATEST).is_file():
        fields, state = read_weights(path)
        return InitialWeights(path, ModelConfig(**fields), state, {})
    loaded = checkpoint.load(path / LATEST if path.is_dir() else path)
    moments = loaded.parts.get("optimizer", {}).get("moments", {})
    names = loaded.parts.get("vocabulary")
    vocabulary = Vocabulary.from_state(names, str(path)) if names else None
    return InitialWeights(path, ModelConfig(**loaded.section("model")), loaded.part("model"), moments, vocabulary)


def adapt_to_weights(config: RunConfig, weights: InitialWeights) -> RunConfig:
    """The run's configuration with the shape that `weights` have; ConfigError where a given flag contradicts it.

    The head is the run's own. Without --target-layers the model does not grow.
    """
    given, model = config.given, weights.model
    refuse_unnamed_parts(model.replace(head="hpn"))  # the head is the run's own
    target = config.target_layers if "target_layers" in given else model.n_layer
    shape = {name: getattr(model, name) for name in ArchitectureFields.model_fields if name not in _OF_THE_RUN}
    shape |= {"vocab_size": model.vocab_size, "base_layers": model.n_layer}
    if config.data and "vocab_size" not in given:
        del shape["vocab_size"]  # known when the folder has been read: see `grown_vocabulary`
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


def grown_vocabulary(weights: InitialWeights, vocabulary: Vocabulary | None, size: int) -> int:
    """Tokens of a model from weights on data of `size` tokens: its own, and those of new items behind them.

    UserError where the data's items are not those of the weights with new ones behind.
    """
    held, own = weights.model.vocab_size, weights.vocabulary
    if own is None or vocabulary is None:
        if size > held:
            raise UserError(f"--init-from {weights.source}: knows {held:,} tokens, the data has {size:,}")
    elif not (vocabulary.begins_with(own) or own.begins_with(vocabulary)):
        raise UserError(
            f"--init-from {weights.source}: its items have different tokens from those of the data: prepare the data "
            f"with prepare events --vocab-from {weights.source}"
        )
    return max(size, held)


# The fields of a run that the weights it starts from decide, whatever its data would suggest.
SHAPE = frozenset(ArchitectureFields.model_fields) | {"base_layers", "target_layers"}


def load_weights(model: SequenceModel, weights: InitialWeights) -> tuple[list[str], dict[str, Any]]:
    """Loads what fits; what the user should know about it, and the moments of what was loaded."""
    _refuse_other_settings(model.config, weights)
    more_items = weights.model.n_class is None and model.config.n_class is None
    same_classes = weights.model.classes == model.config.classes or more_items
    same_head = weights.model.head == model.config.head and same_classes
    if same_head and model.config.tie_embedding and not weights.model.tie_embedding:
        raise ConfigError(f"--tie-embedding 1: {weights.source} has an embedding and a head of its own; leave it out")
    state, moments = (
        {k: v for k, v in each.items() if same_head or not k.startswith("head.")}
        for each in (weights.state, weights.moments)
    )
    appended = _append_rows(state, model, weights.model.vocab_size)
    moments = {name: each for name, each in moments.items() if name not in appended}
    missing, unexpected = model.load_state_dict(state, strict=False)
    lost = [name for name in (*missing, *unexpected) if not name.startswith("head.")]
    if lost:
        raise UserError(f"{weights.source}: does not fit the model: {', '.join(lost[:5])}")
    notes = [f"weights from {weights.source} ({counted(weights.model.n_layer, 'layer')})"]
    if appended:
        new = model.config.vocab_size - weights.model.vocab_size
        notes.append(f"{counted(new, 'new item')} with fresh rows; all others keep their trained rows")
    if not same_head:
        notes.append(f"its {weights.model.head} head is left out: the {model.config.head} head starts from scratch")
    return notes, moments


def _append_rows(state: dict[str, Tensor], model: SequenceModel, held: int) -> list[str]:
    """Give each table of `held` rows in `state` the model's own fresh rows behind them; the names of those tables."""
    own = model.state_dict()
    appended = []
    for name, table in state.items():
        fresh = own.get(name)
        if fresh is None or table.shape == fresh.shape or not table.ndim or table.shape[0] != held:
            continue
        if table.shape[1:] == fresh.shape[1:] and fresh.shape[0] == model.config.vocab_size:
            state[name] = torch.cat((table, fresh[held:].to(table.dtype)))
            appended.append(name)
    return appended


def refuse_other_kinds(model: ModelConfig, weights: InitialWeights) -> None:
    """ConfigError where a layer of the model is not of the weights' kind."""
    kinds, held = model.kinds(model.n_layer), weights.model.kinds(weights.model.n_layer)
    if kinds != held:
        raise ConfigError(
            f"--layers: {weights.source} has {','.join(held)}, and the places they would take are for {','.join(kinds)}"
        )


def _refuse_other_settings(model: ModelConfig, weights: InitialWeights) -> None:
    """ConfigError where layers of one kind have other settings than those of the weights."""
    for kind, values in weights.model.layer_options.items():
        for key, value in values.items():
            found = model.layer_options.get(kind, {}).get(key, value)
            if found != value:
                raise ConfigError(f"--layer-option {kind}.{key}: {weights.source} has {value}, given {found}")
