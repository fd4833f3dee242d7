"""What the commands on a finished checkpoint share: the flags for its code and for the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from protomamba.config import ModelConfig
from protomamba.run_config import RunConfig

if TYPE_CHECKING:
    from protomamba.checkpoint.file import Checkpoint

# Parts have to be named where the checkpoint's are not ours: see model/registry.py.
CODE_FLAGS = ("layer", "layers", "head", "input")
MACHINE_FLAGS = ("threads", "kernels")
THE_CHECKPOINTS = "the checkpoint's"
A_CHECKPOINT = "checkpoint file, such as runs/mine/best.safetensors"


def refuse_other_code(loaded: Checkpoint, config: RunConfig) -> None:
    """Import the parts that the user named; ConfigError unless they are the checkpoint's own."""
    from protomamba.model.registry import refuse_other_parts
    from protomamba.train.build import load_named_code

    load_named_code(config)
    named = {what: getattr(config, what) for what in CODE_FLAGS if what in config.given}
    refuse_other_parts(ModelConfig(**loaded.section("model")), named)
