"""Weights to and from a folder of transformers' MambaForCausalLM, without transformers: config.json and safetensors.

The mixer's parameters have the published names on both sides; what differs is around it:

    embedding.weight          backbone.embeddings.weight
    layers.{i}.*              backbone.layers.{i}.*
    norm_f.weight             backbone.norm_f.weight
    head.weight               lm_head.weight

A hyperspherical head leaves as lm_head = s p_k/|p_k| with the fitted scale s, and norm_f as norm_f/|norm_f|. Then
logit_k = s |z'| c_k, so the largest logit is the largest cosine at every position, whatever |z'|: greedy decoding
agrees. And |z'| is about 1 (exactly 1 for a constant norm_f), so that the probabilities are about the calibrated ones.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import normalize

from protomamba.config import NORM_EPS, ModelConfig
from protomamba.errors import ConfigError, UserError
from protomamba.storage import atomic_file, atomic_path, make_folder

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
PICKLES = ("*.bin", "*.bin.index.json", "*.pt", "*.pth", "*.ckpt", "*.pkl")

# What their config.json may say that our block cannot be: key -> (value where the key is absent, values we can be).
FIXED: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "model_type": (None, ("mamba",)),
    "use_bias": (False, (False,)),
    "hidden_act": ("silu", ("silu", "swish")),
    "layer_norm_epsilon": (1e-5, (NORM_EPS,)),
    "quantization_config": (None, (None,)),
}
# Ours <- theirs, with the value transformers takes where the key is absent (MambaConfig).
SIZES = {
    "vocab_size": ("vocab_size", 50280),
    "n_layer": ("num_hidden_layers", 32),
    "d_model": ("hidden_size", 768),
    "d_state": ("state_size", 16),
    "d_conv": ("conv_kernel", 4),
    "expand": ("expand", 2),
}


def read_transformers_folder(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The fields of a ModelConfig, and a state dict for it in float32, from a folder that holds a MambaForCausalLM.

    Reads safetensors, one file or sharded. Raises UserError for a pickle, a setting our block does not have, and
    tensors that are missing, unknown, of the wrong shape, not floating-point or not finite; each by name.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: expected a folder with config.json and {SINGLE}, but it is not a folder")
    settings = _read_json(path / "config.json")
    values = _model_values(path / "config.json", settings)
    found = _completed(path, settings, _read_tensors(path))
    state = {ours: _take(path, found, theirs, shape) for ours, theirs, shape in _layout(values)}
    if found:
        raise UserError(f"{path}: tensor {min(found)} is not part of a MambaForCausalLM of this config.json")
    if values["tie_embedding"]:
        state["head.weight"] = state["embedding.weight"]
    return values, state


def write_transformers_folder(
    out_dir: Path,
    config: ModelConfig,
    state: Mapping[str, Tensor],
    *,
    eos_token: int | None = None,
    tokenizer_files: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write a folder that transformers' `AutoModelForCausalLM.from_pretrained` loads; returns the files written.

    state: a SequenceModel's state dict; tokenizer_files: name -> text, as `export.tokenizer_files` makes them.
    config.json is written last, so that a folder that loads is whole. Raises UserError for a model that the layout
    cannot hold.
    """
    refuse_inexpressible(config)
    settings = _their_config(config, eos_token)
    tensors = _their_tensors(config, state)
    out_dir = Path(out_dir)
    make_folder(out_dir)
    _write_tensors(tensors, out_dir / SINGLE)
    texts = {**(tokenizer_files or {}), "config.json": json.dumps(settings, indent=2) + "\n"}
    for name, text in texts.items():
        with atomic_file(out_dir / name) as file:
            file.write(text.encode())
    return [out_dir / name for name in (SINGLE, *texts)]


def transformers_names(config: ModelConfig) -> dict[str, str]:
    """Our name of each parameter of a mamba model with a softmax head -> the name it has in a MambaForCausalLM."""
    values = {**{ours: getattr(config, ours) for ours in SIZES}, "dt_rank": config.time_step_rank}
    return {ours: theirs for ours, theirs, _ in _layout(values)}


def _layout(values: Mapping[str, Any]) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """(our name, their name, shape) of every tensor of a model of these sizes."""
    V, D, N, K, R = (values[name] for name in ("vocab_size", "d_model", "d_state", "d_conv", "dt_rank"))
    E = values["expand"] * D
    yield "embedding.weight", "backbone.embeddings.weight", (V, D)
    mixer = {
        "in_proj.weight": (2 * E, D),
        "conv1d.weight": (E, 1, K),
        "conv1d.bias": (E,),
        "x_proj.weight": (R + 2 * N, E),
        "dt_proj.weight": (E, R),
        "dt_proj.bias": (E,),
        "A_log": (E, N),
        "D": (E,),
        "out_proj.weight": (D, E),
    }
    for i in range(values["n_layer"]):
        yield f"layers.{i}.norm.weight", f"backbone.layers.{i}.norm.weight", (D,)
        for name, shape in mixer.items():
            yield f"layers.{i}.mixer.{name}", f"backbone.layers.{i}.mixer.{name}", shape
    yield "norm_f.weight", "backbone.norm_f.weight", (D,)
    yield "head.weight", "lm_head.weight", (V, D)


def _model_values(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    for key, (absent, possible) in FIXED.items():
        if (found := settings.get(key, absent)) not in possible:
            raise UserError(f"{file}: {key}: expected {' or '.join(map(repr, possible))}, found {found!r}")
    values: dict[str, Any] = {"layer": "mamba", "head": "softmax"}
    for ours, (theirs, absent) in SIZES.items():
        values[ours] = _count(file, theirs, settings.get(theirs, absent))
    rank = settings.get("time_step_rank", "auto")
    values["dt_rank"] = -(-values["d_model"] // 16) if rank == "auto" else _count(file, "time_step_rank", rank)
    values["tie_embedding"] = bool(settings.get("tie_word_embeddings", True))
    inner = values["expand"] * values["d_model"]
    if (found := settings.get("intermediate_size", inner)) != inner:
        raise UserError(f"{file}: intermediate_size: expected expand * hidden_size = {inner}, found {found!r}")
    try:
        ModelConfig(**values)
    except ConfigError as error:
        raise UserError(f"{file}: {error}") from None
    return values


def _count(file: Path, key: str, value: Any) -> int:
    """A positive integer; 2.0 is one, as some config.json write `expand`."""
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    whole = whole and not isinstance(value, bool)
    if not whole or value < 1:
        raise UserError(f"{file}: {key}: expected a whole number from 1, found {value!r}")
    return int(value)


def _read_tensors(path: Path) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for file in _tensor_files(path):
        try:
            tensors.update(load_file(file))
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{file}: not a readable safetensors file: {' '.join(str(error).split())}") from None
    return tensors


def _tensor_files(path: Path) -> list[Path]:
    if (path / SINGLE).is_file():
        return [path / SINGLE]
    if (path / INDEX).is_file():
        names = _read_json(path / INDEX).get("weight_map")
        if not isinstance(names, dict) or not all(isinstance(name, str) for name in names.values()):
            raise UserError(f"{path / INDEX}: expected a weight_map from tensor names to files")
        if outside := [name for name in names.values() if Path(name).name != name]:
            raise UserError(f"{path / INDEX}: expected files of this folder, found {outside[0]!r}")
        return [path / name for name in sorted(set(names.values()))]
    if pickles := sorted(file.name for pattern in PICKLES for file in path.glob(pattern)):
        raise UserError(
            f"{path}: weights only as a pickle ({pickles[0]}), which can run code when it is read; convert it "
            f"to {SINGLE} where you trust it: from_pretrained(...).save_pretrained(...) of a current transformers does"
        )
    raise UserError(f"{path}: expected {SINGLE} or {INDEX}, found neither")


def _completed(path: Path, settings: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under one spelling, with those added that a setting lets a folder leave out."""
    if "backbone.embedding.weight" in tensors:  # as the first published conversions spell it
        tensors["backbone.embeddings.weight"] = tensors.pop("backbone.embedding.weight")
    if not settings.get("use_conv_bias", True):
        biases = {name.replace(".weight", ".bias"): w for name, w in tensors.items() if name.endswith("conv1d.weight")}
        tensors |= {name: torch.zeros(len(weight)) for name, weight in biases.items()}
    embedding = tensors.get("backbone.embeddings.weight")
    if settings.get("tie_word_embeddings", True) and embedding is not None:
        output = tensors.setdefault("lm_head.weight", embedding)
        if output is not embedding and not torch.equal(output, embedding):
            raise UserError(
                f"{path}: lm_head.weight differs from backbone.embeddings.weight, though config.json says "
                f"tie_word_embeddings: set it to false to keep both"
            )
    return tensors


def _take(path: Path, found: dict[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Remove a tensor from `found` and return it, checked, in float32."""
    if name not in found:
        raise UserError(f"{path}: tensor {name} {list(shape)} is missing")
    tensor = found.pop(name)
    if tuple(tensor.shape) != shape:
        raise UserError(f"{path}: {name}: expected shape {list(shape)} by config.json, found {list(tensor.shape)}")
    if not tensor.is_floating_point():
        raise UserError(f"{path}: {name}: expected floating point, found {tensor.dtype}")
    if not (tensor := tensor.float()).isfinite().all():
        raise UserError(f"{path}: {name} holds NaN or infinite values")
    return tensor


def refuse_inexpressible(config: ModelConfig) -> None:
    """UserError for a model that is no MambaForCausalLM."""
    if config.layer != "mamba":
        raise UserError(
            f"export to transformers: a MambaForCausalLM is made of mamba layers, and this model's are {config.layer}"
        )
    if config.head not in ("hpn", "softmax"):
        raise UserError(
            f"export to transformers: head {config.head} is not a matrix of output weights; hpn and softmax are"
        )
    if config.classes != config.vocab_size:
        raise UserError(
            f"export to transformers: a MambaForCausalLM predicts its own {config.vocab_size} tokens, "
            f"and this head has {config.classes} other classes"
        )


def _their_config(config: ModelConfig, eos_token: int | None) -> dict[str, Any]:
    """Every key that decides what the model computes, none left to a default; the token ids too, whose default is 0."""
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        **{theirs: getattr(config, ours) for ours, (theirs, _) in SIZES.items()},
        "intermediate_size": config.expand * config.d_model,
        "time_step_rank": config.time_step_rank,
        "use_bias": False,
        "use_conv_bias": True,
        "hidden_act": "silu",
        "layer_norm_epsilon": NORM_EPS,
        "residual_in_fp32": True,
        "tie_word_embeddings": config.tie_embedding,
        "torch_dtype": "float32",
        "bos_token_id": None,
        "eos_token_id": eos_token,
        "pad_token_id": eos_token,
    }


def _their_tensors(config: ModelConfig, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    state, names = dict(state), transformers_names(config)
    if config.head == "hpn":
        state["head.weight"] = state["head.scale"].double() * normalize(state["head.prototypes"].double(), dim=1)
        state["norm_f.weight"] = normalize(state["norm_f.weight"].double(), dim=0)
    if config.tie_embedding:
        del names["head.weight"]
    return {theirs: state[ours].detach().float().contiguous() for ours, theirs in names.items()}


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: expected a JSON object, found {type(content).__name__}")
    return content


def _write_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    try:
        with atomic_path(file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be written: {error}") from None
