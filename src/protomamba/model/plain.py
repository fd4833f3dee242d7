"""Whether a module is ours as it was made: only then may one kernel stand for what its parts would do, one by one."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_TENSORS = (nn.Parameter, Tensor)


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether a module is of exactly this class, with no hook, parametrization or `forward` of its own, and whether its
    parameters are plain tensors."""
    own = module.__dict__
    return (
        type(module) is kind
        and not own["_forward_hooks"]
        and not own["_forward_pre_hooks"]
        and not own["_backward_hooks"]
        and not own["_backward_pre_hooks"]
        and "forward" not in own
        and all(type(each) in _TENSORS for each in own["_parameters"].values() if each is not None)
    )


def passes_through(dropout: nn.Module) -> bool:
    """Whether leaving out a dropout changes nothing: it is torch's own, it has no hook, and it drops nothing now."""
    return is_plain(dropout, nn.Dropout) and (not dropout.training or getattr(dropout, "p", 0) == 0)


def any_global_hook() -> bool:
    """Whether a global hook is registered on every module of the process."""
    return bool(torch_module._has_any_global_hook())  # type: ignore[no-untyped-call]


def why_not_plain(module: nn.Module, kind: type[nn.Module]) -> str:
    """What is_plain found, in words; for a module that is not plain."""
    if type(module) is not kind:
        found = type(module)
        name = f"{found.__module__}.{found.__name__}" if found.__name__ == kind.__name__ else found.__name__
        return f"is {name}, not {kind.__name__}"
    if any(module.__dict__[hooks] for hooks in _HOOKS):
        return "has a hook"
    return "has its own forward" if "forward" in module.__dict__ else "has parameters that are not plain tensors"
