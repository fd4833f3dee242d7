"""The base of every configuration: fields with defaults, bounds and help, and a one-line error for a wrong value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, get_args, get_origin

from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from protomamba.errors import ConfigError


class Schema(BaseModel):
    """Frozen, keyword-only, strict about unknown names; a wrong value raises ConfigError, not pydantic's own error.

    `given` names the fields that were set explicitly, not left to their defaults; it survives every `replace`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())

    TITLE: ClassVar[str] = ""  # of the group of flags in --help
    _given: frozenset[str] = PrivateAttr(default=frozenset())

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise ConfigError("; ".join(_explain(type(self), e) for e in error.errors())) from None
        self._given = frozenset(values)

    @classmethod
    def recorded(cls, values: Mapping[str, Any]) -> Self:
        """The configuration stored in a file; none of its fields count as given."""
        config = cls(**values)
        config._given = frozenset()
        return config

    @property
    def given(self) -> frozenset[str]:
        """The names of the fields that were set: by a flag, in a configuration file, or in the constructor."""
        return self._given

    @classmethod
    def default(cls, name: str) -> Any:
        """The value of a field that is not given."""
        return cls.model_fields[name].default

    def replace(self, **changes: Any) -> Self:
        """A copy with `changes`, validated again. The changed fields do not count as given by the user."""
        config = type(self)(**{**self.model_dump(), **changes})
        config._given = self._given
        return config

    def __eq__(self, other: object) -> bool:
        return type(self) is type(other) and isinstance(other, Schema) and self.model_dump() == other.model_dump()

    __hash__ = None  # type: ignore[assignment]

    def project(self, schema: type[Schema], **extra: Any) -> Any:
        """The fields that `schema` shares with this config, as an instance of `schema`."""
        shared = {k: v for k, v in self.model_dump().items() if k in schema.model_fields and k not in extra}
        projected = schema(**shared, **extra)
        projected._given = (self._given & shared.keys()) | extra.keys()
        return projected


def parse_option(text: str, flag_name: str) -> tuple[str, str]:
    """KEY=VALUE as a field's name and its text. ConfigError for anything else."""
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise ConfigError(f"{flag_name} {text!r}: expected KEY=VALUE")
    return key.strip().replace("-", "_"), value.strip()


def part_settings(schema: type[Schema], fields: Schema, options: Iterable[str], flag_name: str) -> Any:
    """The settings of a part: the fields of the run that have the names of its own, then its options, KEY=VALUE each.

    Raises ConfigError for an option that the part does not have, with the nearest name, or a value out of bounds.
    """
    values = {name: getattr(fields, name) for name in schema.model_fields if hasattr(fields, name)}
    for key, text in (parse_option(option, flag_name) for option in options):
        if key not in schema.model_fields:
            known = ", ".join(schema.model_fields) or "none"
            raise ConfigError(
                f"{flag_name} {key}: unknown setting{nearest(key, schema.model_fields)}; there are: {known}"
            )
        values[key] = text
    return schema(**values)


def flag(name: str) -> str:
    """The command-line spelling of a field: options of parts are given one at a time."""
    single = name.removesuffix("s") if name.endswith("_options") else name
    return "--" + single.replace("_", "-")


def nearest(name: str, known: Iterable[str]) -> str:
    """A ' (did you mean X?)' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""


def is_repeatable(annotation: Any) -> bool:
    """Whether a flag may be given several times: its field is a tuple of texts, or a table of options."""
    return get_origin(annotation) in (tuple, dict)


def group_of(schema: type[Schema], name: str) -> type[Schema]:
    """The class among a schema's ancestors that declares a field."""
    return next(each for each in schema.__mro__ if issubclass(each, Schema) and name in each.__annotations__)


def _explain(schema: type[Schema], error: ErrorDetails) -> str:
    """One line for one pydantic error: the flag, what was found, what is allowed."""
    name = str(error["loc"][0]) if error["loc"] else schema.__name__
    if error["type"] == "extra_forbidden":
        return f"unknown field {name!r} of {schema.__name__}{nearest(name, schema.model_fields)}"
    if error["type"] == "missing":
        return f"{schema.__name__} needs {name}"
    if name not in schema.model_fields:
        return f"{name}: {error['msg']}"
    return f"{flag(name)} {error['input']!r}: expected {describe_bounds(schema, name)}"


def describe_bounds(schema: type[Schema], name: str) -> str:
    """What a field takes, in words: 'an integer >= 1 and <= 64', 'one of a, b'."""
    field = schema.model_fields[name]
    kind = value_type(field.annotation)
    if is_repeatable(kind):
        return "KEY=VALUE or KIND.KEY=VALUE (in a config file, a table)" if get_origin(kind) is dict else "texts"
    if choices := get_args(kind):
        return "one of " + ", ".join(str(c) for c in choices)
    words = {int: "an integer", float: "a finite number", bool: "1, 0, true or false", Path: "a path", str: "text"}[
        kind
    ]
    bounds = [bound for constraint in field.metadata for bound in _bound_words(constraint)]
    return " ".join([words, " and ".join(bounds)]).rstrip()


def value_type(annotation: Any) -> Any:
    """The type behind an optional annotation: `int | None` -> int; a Literal stays itself."""
    options = [a for a in get_args(annotation) if a is not type(None)]
    return options[0] if options and type(None) in get_args(annotation) else annotation


def _bound_words(constraint: Any) -> list[str]:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<", "pattern": "like"}
    return [f"{sign} {getattr(constraint, k)}" for k, sign in signs.items() if getattr(constraint, k, None) is not None]
