"""What turns features into a loss and predictions: the heads by name."""

from __future__ import annotations

from protomamba.model.heads.base import Evaluation, Head
from protomamba.model.heads.hypersphere import HyperspherePrototypes
from protomamba.model.heads.softmax import SoftmaxHead

__all__ = ["HEADS", "Evaluation", "Head", "HyperspherePrototypes", "SoftmaxHead"]

HEADS: dict[str, type[Head]] = {"hpn": HyperspherePrototypes, "softmax": SoftmaxHead}
