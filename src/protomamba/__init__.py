"""CPU-first training of Mamba selective state-space models with a hyperspherical-prototype head.

The public names. Each is loaded from its module when first used, so that importing the package runs nothing heavy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:
    from protomamba.config import ModelConfig, Sampling, TrainConfig
    from protomamba.data import TokenStream, batch_from_tokens, in_memory, open_token_dir, open_token_file
    from protomamba.data.dataset_stream import DatasetStream
    from protomamba.decode import generate
    from protomamba.errors import ConfigError, UserError
    from protomamba.model.heads.base import Head, head
    from protomamba.model.inputs.base import Input, input_part
    from protomamba.model.mixers.base import PLAIN_CALL, ForwardContext, Mixer, MixerOutput, mixer
    from protomamba.model.sequence_model import SequenceModel
    from protomamba.predict.predictor import Predictor
    from protomamba.run_config import RunConfig
    from protomamba.schema import Schema
    from protomamba.train.callbacks.base import Callback
    from protomamba.train.callbacks.collapse import CollapseWatch
    from protomamba.train.callbacks.progress import Progress
    from protomamba.train.optim import OptimizerBase
    from protomamba.train.run import Run
    from protomamba.train.trainer import StepStats, Trainer
    from protomamba.train.validation import Validation

_HOMES = {
    "protomamba.config": ("ModelConfig", "Sampling", "TrainConfig"),
    "protomamba.run_config": ("RunConfig",),
    "protomamba.schema": ("Schema",),
    "protomamba.data": ("TokenStream", "batch_from_tokens", "in_memory", "open_token_dir", "open_token_file"),
    "protomamba.data.dataset_stream": ("DatasetStream",),
    "protomamba.errors": ("ConfigError", "UserError"),
    "protomamba.decode": ("generate",),
    "protomamba.model.heads.base": ("Head", "head"),
    "protomamba.model.inputs.base": ("Input", "input_part"),
    "protomamba.model.mixers.base": ("PLAIN_CALL", "ForwardContext", "Mixer", "MixerOutput", "mixer"),
    "protomamba.model.sequence_model": ("SequenceModel",),
    "protomamba.train.callbacks.base": ("Callback",),
    "protomamba.train.callbacks.collapse": ("CollapseWatch",),
    "protomamba.train.callbacks.progress": ("Progress",),
    "protomamba.train.optim": ("OptimizerBase",),
    "protomamba.train.run": ("Run",),
    "protomamba.predict.predictor": ("Predictor",),
    "protomamba.train.trainer": ("StepStats", "Trainer"),
    "protomamba.train.validation": ("Validation",),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "PLAIN_CALL",
    "Callback",
    "CollapseWatch",
    "ConfigError",
    "DatasetStream",
    "ForwardContext",
    "Head",
    "Input",
    "Mixer",
    "MixerOutput",
    "ModelConfig",
    "OptimizerBase",
    "Predictor",
    "Progress",
    "Run",
    "RunConfig",
    "Sampling",
    "Schema",
    "SequenceModel",
    "StepStats",
    "TokenStream",
    "TrainConfig",
    "Trainer",
    "UserError",
    "Validation",
    "__version__",
    "batch_from_tokens",
    "generate",
    "head",
    "in_memory",
    "input_part",
    "mixer",
    "open_token_dir",
    "open_token_file",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'protomamba' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return __all__
