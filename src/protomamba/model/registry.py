"""Parts by name: a class registers itself where it is defined, or is found as `package.module:Class` of the user's own.

@mixer("mamba2")
class Mamba2(Mixer):
    class Config(Schema):
        headdim: int = 64      # --layer-option headdim=128
    options: Config
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, Generic, TypeVar, cast

from torch import nn

from protomamba.config import ModelConfig, Options, PartFields, compact_pattern, stack_kinds
from protomamba.errors import ConfigError, UserError
from protomamba.schema import Schema, flag, nearest

T = TypeVar("T", bound="Part")


class Part(nn.Module):
    """Base of mixers, heads and inputs, including your own. Constructed as `Class(config)`.

    Config: the part's settings, as a Schema; `self.options` holds an instance of it. A field of the name of a flag
    (--d-state, --expand, ...) is filled by that flag; every field by --layer-option, --head-option or --input-option.
    """

    Config: ClassVar[type[Schema]] = Schema
    FIELD: ClassVar[str]  # of ModelConfig, with the options of parts of this sort

    options: Any
    # The name of a parameter (rows, D) of which a step reads few rows, and whether its gradient is to be those rows.
    row_table: ClassVar[str | None] = None
    row_sparse = False

    def __init__(self, config: ModelConfig, **of_module: Any) -> None:
        super().__init__(**of_module)
        self.options = settings(type(self), config)

    def reads_few_rows(self) -> bool:
        """Whether a training step reads a few rows of `row_table` only."""
        return self.row_table is not None


class Registry(Generic[T]):
    """The classes of one sort of part by name, and the decorator that registers one."""

    def __init__(self, what: str, base: type[T]) -> None:
        self.what, self.base = what, base
        self.classes: dict[str, type[T]] = {}
        _REGISTRIES[base.FIELD] = self

    def __call__(self, name: str) -> Callable[[type[T]], type[T]]:
        """Register the decorated class under `name`, the value of its flag."""

        def register(found: type[T]) -> type[T]:
            if not name.isidentifier() or self.classes.get(name, found).__qualname__ != found.__qualname__:
                raise ValueError(f"{self.what} {name!r}: expected an identifier that no other {self.what} has")
            self.classes[name] = found
            return found

        return register

    def find(self, name: str) -> type[T]:
        """The class called `name`: registered, or `package.module:Class`, which must derive from the base.

        Raises ConfigError where the name is unknown, cannot be imported, or is something else.
        """
        return cast("type[T]", resolve(name, self.classes, self.base, self.what))


def resolve(name: str, registered: Mapping[str, type], base: type, what: str) -> type:
    """The class called `name`, which must derive from `base`; `what` ('layer', 'callback') names the flag in errors.

    Raises ConfigError where the name is unknown, cannot be imported, or is something else.
    """
    if name in registered:
        return registered[name]
    if ":" not in name:
        known = " or ".join([*filter(None, [", ".join(registered)]), "package.module:Class"])
        raise ConfigError(f"--{what} {name}: expected {known}{nearest(name, registered)}")
    module_name, _, class_name = name.partition(":")
    module = _imported(module_name, name, what)
    found: Any = getattr(module, class_name, None)
    if found is None:
        parts = [key for key, each in vars(module).items() if isinstance(each, type) and issubclass(each, base)]
        raise ConfigError(f"--{what} {name}: {module_name} has no {class_name}{nearest(class_name, parts)}")
    if isinstance(found, type) and issubclass(found, base):
        return found
    raise ConfigError(f"--{what} {name}: expected a subclass of {base.__name__}, found {found!r}")


_REGISTRIES: dict[str, Registry[Any]] = {}


def chosen_parts(config: ModelConfig) -> dict[str, list[str]]:
    """The names of the parts that a model is made of, by the field of their options."""
    kinds = list(dict.fromkeys(config.kinds(max(1, config.n_layer))))
    return {"layer_options": kinds, "head_options": [config.head], "input_options": [config.input]}


def settings(part: type[Part], config: ModelConfig) -> Schema:
    """The settings of a part in this model: its own defaults, then flags of the same name, then its options.

    Raises ConfigError for a value that is none of its own.
    """
    values = {
        name: getattr(config, name)
        for name in part.Config.model_fields.keys() & PartFields.model_fields.keys()
        if name in config.given or getattr(config, name) != PartFields.default(name)
    }
    registry = _REGISTRIES[part.FIELD]
    mine = [kind for kind in chosen_parts(config)[part.FIELD] if registry.find(kind) is part]
    for kind, key, value in _single(getattr(config, part.FIELD)):
        if key in part.Config.model_fields and (kind is None or kind in mine):
            values[key] = None if value in ("auto", "none") else value
    try:
        return part.Config(**values)
    except ConfigError as error:
        raise ConfigError(f"{flag(part.FIELD)} of {mine[0] if mine else part.__name__}: {error}") from None


def with_settings(config: ModelConfig) -> ModelConfig:
    """The configuration with every setting of its parts written out, so that a checkpoint says all of them.

    A setting with a flag of its own stands under that name where all parts that have it agree. Raises ConfigError for
    an option that no part of the model has.
    """
    changes: dict[str, Any] = {}
    for field, kinds in chosen_parts(config).items():
        parts = {kind: _REGISTRIES[field].find(kind) for kind in kinds}
        _refuse_unknown(field, getattr(config, field), parts)
        values = {kind: settings(part, config).model_dump(mode="json") for kind, part in parts.items()}
        for name, flagged in PartFields.model_fields.items():
            found = [each[name] for each in values.values() if name in each]
            defaults = {part.Config.default(name) for part in parts.values() if name in part.Config.model_fields}
            if defaults == {flagged.default} and all(each == found[0] for each in found):
                changes[name] = found[0]
                values = {kind: {k: v for k, v in each.items() if k != name} for kind, each in values.items()}
        changes[field] = {kind: each for kind, each in values.items() if each}
    return config.replace(**changes)


def idle_settings(config: ModelConfig) -> dict[str, list[str]]:
    """Flags of parts that no part of this model declares, with the parts that do. A part without settings of its own
    that is not ours may read every flag from the configuration."""
    chosen = {name: _REGISTRIES[field].find(name) for field, names in chosen_parts(config).items() for name in names}
    if any(":" in name and part.Config is Schema for name, part in chosen.items()):
        return {}
    read = {name for part in chosen.values() for name in part.Config.model_fields}
    return {name: _readers(name) for name in PartFields.model_fields if name not in read}


def _readers(field: str) -> list[str]:
    classes = [(name, part) for registry in _REGISTRIES.values() for name, part in registry.classes.items()]
    return [name for name, part in classes if field in part.Config.model_fields]


def _single(options: Options) -> Iterator[tuple[str | None, str, Any]]:
    """(kind or None for all, key, value) of each option, those of a kind last: they are the more particular ones."""
    for key, value in sorted(options.items(), key=lambda item: isinstance(item[1], Mapping)):
        if isinstance(value, Mapping):
            yield from ((key, inner, each) for inner, each in value.items())
        else:
            yield None, key, value


def merged_options(recorded: Options, given: Options) -> Options:
    """The options of a checkpoint, by kind, overridden by those that are given."""
    merged = dict(given)
    for kind, values in recorded.items():
        over = {**{k: v for k, v in given.items() if k in values}, **given.get(kind, {})}
        merged[kind] = {**values, **over}
    return merged


def _refuse_unknown(field: str, options: Options, parts: Mapping[str, type[Part]]) -> None:
    """ConfigError for an option that none of the parts has, with the nearest name that one has."""
    for kind, key, _ in _single(options):
        if kind is not None and kind not in parts:
            raise ConfigError(f"{flag(field)} {kind}.{key}: the model has no {kind}{nearest(kind, parts)}")
        among = parts if kind is None else {kind: parts[kind]}
        known = {name for part in among.values() for name in part.Config.model_fields}
        if key not in known:
            listed = ", ".join(sorted(known)) or "none"
            raise ConfigError(
                f"{flag(field)} {key}: {' and '.join(among)} has no such setting{nearest(key, known)}; it has {listed}"
            )


def _imported(module_name: str, name: str, what: str) -> Any:
    try:
        return importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(f"--{what} {name}: cannot import {module_name}: {error} (is it on PYTHONPATH?)") from None


def load_named(name: str, what: str) -> None:
    """Import the module of `package.module:Class` because the user named it, from the current folder too.

    ConfigError where that fails.
    """
    module_name, colon, _ = name.partition(":")
    if colon:
        if os.getcwd() not in sys.path and "" not in sys.path:
            sys.path.append(os.getcwd())  # as `python -m` has it; a console script does not
        _imported(module_name, name, what)


def refuse_unnamed(name: str, what: str, flags: str | None = None) -> None:
    """For a name that a file gave: UserError where it would import code that has not been named or imported yet.

    An import runs the module. Which modules run is for the user to say, not for a checkpoint. flags: what to add to the
    command line to name it, `--what name` if not given.
    """
    module_name, colon, _ = name.partition(":")
    if colon and module_name not in sys.modules:
        raise UserError(
            f"the checkpoint's {what} is {name}, which is not part of protomamba: if you trust that code, add "
            f"{flags or f'--{what} {name}'} (in a program: import {module_name} first)"
        )


def refuse_unnamed_parts(config: ModelConfig) -> None:
    """`refuse_unnamed` for every part of a configuration that came from a file."""
    flags = f"--layers {compact_pattern(config.layers)}" if config.layers else None
    for field, names in chosen_parts(config).items():
        what = field.removesuffix("_options")
        for name in names:
            refuse_unnamed(name, what, flags if what == "layer" else None)


def refuse_other_parts(config: ModelConfig, named: Mapping[str, str | None]) -> None:
    """ConfigError where a part that the user named (by layer, layers, head or input) is not the one of this model.

    Two patterns of layers are the same if they give each layer the same kind.
    """
    for what, name in named.items():
        own = (config.layers or config.layer) if what in ("layer", "layers") else getattr(config, what)
        if what in ("layer", "layers") and name and stack_kinds(name, config.n_layer) == config.kinds(config.n_layer):
            continue
        if name != own:
            shown = (
                f"layers are {compact_pattern(own)}" if what[:5] == "layer" and config.layers else f"{what} is {own}"
            )
            raise ConfigError(f"--{what} {name}: the checkpoint's {shown}")
