"""A model alone, without optimizer and run: a folder of config.json and model.safetensors, a third of a checkpoint.

The tensors have the names of the model's state dict, and any safetensors reader reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from protomamba.errors import UserError
from protomamba.storage import atomic_path, make_folder, write_json

WEIGHTS, CONFIG, FORMAT = "model.safetensors", "config.json", "protomamba weights 1"


def write_weights_folder(
    folder: Path, model: Mapping[str, Any], state: Mapping[str, Tensor], version: str
) -> list[Path]:
    """Write a model's configuration and state dict; returns the files. config.json is last, so a folder that loads is
    whole. Raises UserError where it cannot be written."""
    make_folder(folder)
    unique: dict[int, str] = {}
    for name, tensor in state.items():  # a shared matrix is written once, under its first name
        unique.setdefault(tensor.data_ptr() if tensor.numel() else id(tensor), name)
    tensors = {name: state[name].detach().contiguous() for name in unique.values()}
    try:
        with atomic_path(folder / WEIGHTS) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{folder / WEIGHTS}: cannot be written: {error}") from None
    write_json(folder / CONFIG, {"format": FORMAT, "protomamba": version, "model": dict(model)})
    return [folder / WEIGHTS, folder / CONFIG]


def is_weights_folder(folder: Path) -> bool:
    """Whether config.json says that this is one; a folder of transformers has a config.json too."""
    try:
        content = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and content.get("format") == FORMAT and isinstance(content.get("model"), dict)


def read_weights_folder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of the model's configuration, and its state dict. Raises UserError for what is no sound folder."""
    if not is_weights_folder(folder):
        raise UserError(f"{folder / CONFIG}: expected the configuration of a model ({FORMAT!r})")
    try:
        state = load_file(folder / WEIGHTS)
    except (OSError, SafetensorError, ValueError) as error:
        raise UserError(
            f"{folder / WEIGHTS}: not a readable safetensors file: {' '.join(str(error).split())}"
        ) from None
    return json.loads((folder / CONFIG).read_text(encoding="utf-8"))["model"], state
