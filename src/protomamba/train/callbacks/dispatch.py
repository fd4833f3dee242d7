"""The callbacks of a run: called in order, with their state kept for the checkpoint."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from protomamba.train.callbacks.base import Callback

if TYPE_CHECKING:
    from protomamba.train.run import Run


class Callbacks(list[Callback]):
    """The run's own callbacks, then the user's, which cannot disturb the run's random numbers."""

    def __init__(self, own: Sequence[Callback], given: Sequence[Callback]) -> None:
        super().__init__([*own, *given])
        self._given = tuple(given)

    def call_event(self, run: Run, event: str, *arguments: Any) -> None:
        """Call every callback that defines the event."""
        for each in list(self):
            method: Callable[..., None] = getattr(each, event)
            if getattr(type(each), event) is getattr(Callback, event):
                continue
            with _random_state_kept() if each in self._given else contextlib.nullcontext():
                method(run, *arguments)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of the callbacks that have a state, by name."""
        return {each.name: each.state_dict() for each in self if _has_state(each)}  # type: ignore[attr-defined]

    def load_state(self, states: Mapping[str, Any]) -> list[str]:
        """Give each callback its state back; a note for each state that no callback takes."""
        left = dict(states)
        for each in self:
            if each.name in left and _has_state(each):
                each.load_state_dict(left.pop(each.name))  # type: ignore[attr-defined]
        return [
            f"the checkpoint's state of the callback {name} is dropped: this run does not have that callback"
            for name in left
        ]


def _has_state(callback: Callback) -> bool:
    return hasattr(callback, "state_dict") and hasattr(callback, "load_state_dict")


@contextlib.contextmanager
def _random_state_kept() -> Iterator[None]:
    """Put the generators of torch, Python and numpy back where they were."""
    of_torch, of_python, of_numpy = torch.get_rng_state(), random.getstate(), np.random.get_state()
    try:
        yield
    finally:
        torch.set_rng_state(of_torch)
        random.setstate(of_python)
        np.random.set_state(of_numpy)
