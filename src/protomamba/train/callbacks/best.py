"""Which validation was the best so far, and when to stop for want of a better one."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from protomamba.storage import SaveError
from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.train.run import Run
    from protomamba.train.validation import Validation

STATE = ("best_val_nll", "best_val_loss", "best_step", "stale_validations")


class Best(Callback):
    """Marks the best validation, by its cross entropy (nats), or by its loss where the head has no probabilities.

    Stops the run after `patience` validations without a better one (0: never).
    """

    name = "best"

    def __init__(self, patience: int = 0) -> None:
        self.patience = patience
        self.best_val_nll: float | None = None
        self.best_val_loss: float | None = None
        self.best_step: int | None = None
        self.stale_validations = 0
        self._former = self.state_dict()

    @property
    def out_of_patience(self) -> bool:
        return bool(self.patience) and self.stale_validations >= self.patience

    def on_validation(self, run: Run, result: Validation) -> None:
        self._former = self.state_dict()
        judged, former = (result.loss, self.best_val_loss) if result.nll is None else (result.nll, self.best_val_nll)
        finite = math.isfinite(judged) and math.isfinite(result.loss)
        result.best = finite and (former is None or judged < former)
        if result.best:
            self.best_val_nll, self.best_val_loss = result.nll, result.loss
            self.best_step, self.stale_validations = run.trainer.global_step, 0
        else:
            self.stale_validations += 1

    def on_save_error(self, run: Run, error: SaveError) -> None:
        """A later validation has the former best to beat, as the file of this one is not there."""
        folder, step = run.folder, run.trainer.global_step
        if self.best_step == step and folder is not None and not folder.holds_best(step):
            self.load_state_dict(self._former)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name in STATE:
            setattr(self, name, state.get(name))
        self.stale_validations = int(state.get("stale_validations") or 0)
