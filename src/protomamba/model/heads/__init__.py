"""What turns features into a loss and predictions. Importing this registers all of ours."""

from __future__ import annotations

from protomamba.model.heads.base import Evaluation, Head, head
from protomamba.model.heads.hypersphere import HyperspherePrototypes
from protomamba.model.heads.softmax import SoftmaxHead

__all__ = ["HEADS", "Evaluation", "Head", "HyperspherePrototypes", "SoftmaxHead", "head"]

HEADS = head.classes
