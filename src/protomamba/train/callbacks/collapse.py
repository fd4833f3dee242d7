"""Warns as soon as a validation shows that the loss falls while nothing is learned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.train.run import Run
    from protomamba.train.validation import Validation

COLLAPSE_COSINE = 0.9
# In few dimensions random directions are as near as that: a collapse is also this far above them.
ABOVE_RANDOM = 0.05
FALLEN = 0.9


class CollapseWatch(Callback):
    """Warns if a head's prototypes have drifted together, or if the loss falls while predictions do not improve.

    The documented loss of prototypes, (1 - cos)^2, goes to 0 in a collapse and says nothing: what is watched is the
    distance of the prototypes, the accuracy beside the most common class's share, and the cross entropy.
    """

    name = "collapse_watch"

    def __init__(self) -> None:
        self.first_val_loss: float | None = None
        self.first_val_nll: float | None = None

    def on_validation(self, run: Run, result: Validation) -> None:
        if self.first_val_loss is None:
            self.first_val_loss, self.first_val_nll = result.loss, result.nll
        figures = run.trainer.model.head.diagnostics()
        cosine = figures.get("nearest_cosine", 0.0)
        if cosine > max(COLLAPSE_COSINE, figures.get("random_cosine", -1.0) + ABOVE_RANDOM):
            run.warn(
                f"collapse: the prototypes' mean nearest-neighbor cosine is {cosine:.3f}; use --prototypes fixed, "
                "or --separation above 0"
            )
        elif self._falls_in_vain(result):
            run.warn(
                f"possible collapse: the loss falls, but accuracy {result.accuracy:.4f} is no better than always "
                f"predicting the most common class ({result.majority:.4f})"
            )

    def _falls_in_vain(self, result: Validation) -> bool:
        """The loss well below the first, accuracy at the majority's share, and the cross entropy no better either."""
        if result.accuracy > result.majority or self.first_val_loss is None:
            return False
        nll_falls = None not in (result.nll, self.first_val_nll) and result.nll < FALLEN * self.first_val_nll  # type: ignore[operator]
        return result.loss < FALLEN * self.first_val_loss and not nll_falls

    def state_dict(self) -> dict[str, Any]:
        return {"first_val_loss": self.first_val_loss, "first_val_nll": self.first_val_nll}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.first_val_loss, self.first_val_nll = state.get("first_val_loss"), state.get("first_val_nll")
