"""The layers of the residual stack. Importing this registers all of ours."""

from __future__ import annotations

from protomamba.model.mixers.attention import Attention
from protomamba.model.mixers.base import Block, ForwardContext, Mixer, MixerOutput, mixer
from protomamba.model.mixers.mamba import Compact, Mamba

__all__ = ["Attention", "Block", "Compact", "ForwardContext", "Mamba", "Mixer", "MixerOutput", "mixer"]
