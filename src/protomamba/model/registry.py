"""Finds a layer or head class by name: one of ours, or `package.module:Class` of the user's own."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from protomamba.config import ModelConfig, nearest
from protomamba.errors import ConfigError, UserError

T = TypeVar("T")


def resolve(
    name: str, builtin: Mapping[str, Callable[[ModelConfig], T]], base: type, what: str
) -> Callable[[ModelConfig], T]:
    """The class called `name`, which must derive from `base`; `what` ('layer', 'head') names the flag in errors.

    Raises ConfigError where the name is unknown, cannot be imported, or is something else.
    """
    if name in builtin:
        return builtin[name]
    if ":" not in name:
        raise ConfigError(
            f"--{what} {name}: expected {', '.join(builtin)} or package.module:Class{nearest(name, builtin)}"
        )
    module_name, _, class_name = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except ImportError as error:
        raise ConfigError(f"--{what} {name}: cannot import {module_name}: {error} (is it on PYTHONPATH?)") from None
    except AttributeError:
        raise ConfigError(f"--{what} {name}: {module_name} has no {class_name}") from None
    if isinstance(found, type) and issubclass(found, base):
        return cast(Callable[[ModelConfig], T], found)
    raise ConfigError(f"--{what} {name}: expected a subclass of {base.__name__}, found {found!r}")


def load_named(name: str, what: str) -> None:
    """Import the module of `package.module:Class` because the user named it, from the current folder too.

    ConfigError where that fails.
    """
    module_name, colon, _ = name.partition(":")
    if colon:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m` has it; a console script does not
        try:
            importlib.import_module(module_name)
        except ImportError as error:
            raise ConfigError(f"--{what} {name}: cannot import {module_name}: {error} (is it on PYTHONPATH?)") from None


def refuse_unnamed(name: str, what: str) -> None:
    """For a name that a file gave: UserError where it would import code that nobody has named or imported yet.

    An import runs the module. Which modules run is for the user to say, not for a checkpoint.
    """
    module_name, colon, _ = name.partition(":")
    if colon and module_name not in sys.modules:
        raise UserError(
            f"the checkpoint's {what} is {name}, code that is not ours: if you trust it, name it with --{what} {name} "
            f"(in a program: import {module_name} first)"
        )
