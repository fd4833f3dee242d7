"""Backward passes that cannot be differentiated themselves, and say so when that is tried."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

NO_SECOND = (
    b"the native kernels have no second derivatives (create_graph=True): use torch.func, which takes the reference "
    b"path, or protomamba.kernels.set_kernels('reference')"
)


def once_differentiable(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward pass whose gradients raise RuntimeError when they are differentiated again.

    torch's own decorator lets them be constants where the incoming gradient is one, as a loss's is: a gradient
    penalty would then change nothing, silently.
    """

    @functools.wraps(backward)
    def wrapped(ctx: Any, *gradients: Any) -> Any:
        with torch.no_grad():
            found = backward(ctx, *gradients)
        return _refused_twice(found) if torch.is_grad_enabled() else found

    return wrapped


def _refused_twice(found: Any) -> Any:
    """The same gradients, of a node that raises when autograd comes to it."""
    gradients = found if isinstance(found, tuple) else (found,)
    node = torch._C._functions.DelayedError(NO_SECOND, len(gradients))
    return node(*(each.detach().requires_grad_() if isinstance(each, Tensor) else each for each in gradients))
