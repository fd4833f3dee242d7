"""What a checkpoint of an older format lacks to be one of the next: explicit steps, each on the decoded content.

Format 1 is protomamba 0.1's. Weights and moments are never touched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Content = dict[str, Any]


def from_1(parts: Mapping[str, Any], config: Mapping[str, Any]) -> tuple[Content, Content]:
    """Format 2: what a run remembers from validation to validation belongs to callbacks, each under its name."""
    parts, config = dict(parts), {"protomamba": "0.1.0", **config}
    progress = parts.pop("progress", None)
    if progress is not None:
        best = {name: progress[name] for name in ("best_val_loss", "best_step", "stale_validations")}
        parts["callbacks"] = {
            "best": {"best_val_nll": None, **best},
            "collapse_watch": {"first_val_loss": progress["first_val_loss"], "first_val_nll": None},
        }
    return parts, config


MIGRATIONS = {1: from_1}
