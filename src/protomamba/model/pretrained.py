"""A model from files and to files: checkpoints, folders of weights alone, and transformers' Mamba folders."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from protomamba import __version__
from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.folder import LATEST
from protomamba.checkpoint.transformers_folder import read_transformers_folder
from protomamba.checkpoint.weights_folder import is_weights_folder, read_weights_folder, write_weights_folder
from protomamba.config import ModelConfig
from protomamba.errors import UserError
from protomamba.memory import out_of_memory
from protomamba.model.registry import refuse_unnamed_parts
from protomamba.model.sequence_model import SequenceModel


def load_pretrained(path: Path) -> SequenceModel:
    """The model, in evaluation mode, of a checkpoint, a run folder (its latest checkpoint), a folder of weights or a
    transformers Mamba folder. Raises UserError for anything else, or where it names code that has not been imported."""
    if not path.exists():
        raise UserError(f"{path}: there is no such checkpoint or folder")
    if not path.is_dir() or (path / LATEST).is_file():
        return build_model(checkpoint.load(path / LATEST if path.is_dir() else path)).eval()
    fields, state = read_weights(path)
    return model_of(ModelConfig(**fields), state).eval()


def read_weights(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a ModelConfig, and a state dict, of a folder that is no run. Raises UserError."""
    if is_weights_folder(folder):
        return read_weights_folder(folder)
    fields, state = read_transformers_folder(folder)
    return {"head": "softmax", **fields}, state


def save_pretrained(model: SequenceModel, folder: Path) -> list[Path]:
    """Write the model's configuration and weights; returns the files. Raises UserError for a model whose parameters are
    not those of its configuration."""
    model.refuse_unbuildable()
    return write_weights_folder(folder, model.config.model_dump(mode="json"), model.state_dict(), __version__)


def build_model(loaded: checkpoint.Checkpoint) -> SequenceModel:
    """The model of a checkpoint with its weights, their dtypes, and what of them is frozen."""
    model = model_of(ModelConfig(**loaded.section("model")), loaded.part("model"))
    freeze_as(model, loaded.config.get("frozen"))
    return model


def freeze_as(model: SequenceModel, frozen: Any) -> None:
    """Freeze layers (by a policy), the embedding and parameters, as a checkpoint says. UserError where it says no such
    thing."""
    fields = frozen if isinstance(frozen, Mapping) else {}
    layers, embedding, names = fields.get("layers"), fields.get("embedding"), fields.get("parameters", [])
    parameters = dict(model.named_parameters())
    known = isinstance(names, list) and all(isinstance(name, str) and name in parameters for name in names)
    if not (isinstance(layers, str) and isinstance(embedding, bool) and known):
        raise UserError(
            f"the checkpoint's configuration is damaged: frozen: expected layers, embedding and names of parameters, "
            f"found {str(frozen)[:100]}"
        )
    model.freeze(layers, embedding)
    for name in names:
        parameters[name].requires_grad_(False)


def _sized(config: ModelConfig, state: Mapping[str, Tensor]) -> SequenceModel:
    """A fresh model. UserError for sizes that are not the state's, told before memory is asked for where possible."""
    if other := next((name for name, tensor in state.items() if not isinstance(tensor, Tensor)), None):
        raise UserError(f"the weights hold {other!r}, which is no tensor but {type(state[other]).__name__}")
    table, expected = state.get("embedding.weight"), (config.vocab_size, config.d_model)
    if table is not None and tuple(table.shape) != expected:
        raise UserError(f"the weights do not fit their configuration: embedding {tuple(table.shape)}, not {expected}")
    if config.n_layer > len(state):
        raise UserError(f"the weights do not fit their configuration: {len(state)} tensors for {config.n_layer} layers")
    if config.classes > (numbers := sum(tensor.numel() for tensor in state.values())):
        raise UserError(f"the weights do not fit their configuration: {numbers:,} numbers for {config.classes} classes")
    try:
        return SequenceModel(config)
    except (RuntimeError, MemoryError) as error:
        if told := out_of_memory(error):
            raise UserError(f"the model of this configuration: {told}") from None
        raise


def model_of(config: ModelConfig, state: Mapping[str, Tensor]) -> SequenceModel:
    """A model with this state, in the state's dtypes. UserError where the two do not fit."""
    refuse_unnamed_parts(config)
    model = _sized(config, state)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        tensor.data = tensor.data.to(state[name].dtype if name in state else tensor.dtype)
    shared = {"head.weight": state["embedding.weight"]} if config.tie_embedding and "embedding.weight" in state else {}
    try:
        model.load_state_dict({**shared, **state})
    except RuntimeError as error:
        raise UserError(f"the weights do not fit their configuration: {' '.join(str(error).split())[:300]}") from None
    return model
