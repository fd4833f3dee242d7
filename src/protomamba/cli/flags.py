"""Flags from the fields of a schema, and back: one parser whose errors name what was meant."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn, get_args, get_origin

from protomamba.config_file import read_config_file
from protomamba.errors import ConfigError
from protomamba.run_config import RunConfig, is_unset
from protomamba.schema import Schema, describe_bounds, flag, group_of, is_repeatable, nearest, value_type


class Parser(argparse.ArgumentParser):
    """argparse whose errors are ConfigErrors with the nearest known name, and which takes no abbreviations."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        defaults = {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(*args, **{**defaults, **kwargs})

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")

    def parse_checked(self, arguments: Sequence[str]) -> argparse.Namespace:
        """parse_args that names the nearest flag for an unknown one."""
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            is_flag = unknown[0].startswith("-")
            hint = nearest(unknown[0].partition("=")[0], known) if is_flag else ""
            raise ConfigError(
                f"unknown {'flag' if is_flag else 'argument'} {unknown[0]}{hint} (see {self.prog} --help)"
            )
        return namespace


def add_fields(
    parser: Parser,
    names: Sequence[str],
    schema: type[Schema] = RunConfig,
    of_checkpoint: str | None = None,
    hidden: bool = False,
) -> None:
    """One flag for each named field of a schema, documented with its default; given ones land in `field:*`.

    of_checkpoint: shown as the default instead, where a checkpoint's own value is used. hidden: taken and not listed.
    """
    groups: dict[str, Any] = {}
    for name in names:
        title = group_of(schema, name).TITLE
        group = groups.setdefault(title, parser.add_argument_group(title) if title and len(names) > 20 else parser)
        field = schema.model_fields[name]
        description = str(field.description).replace("%", "%%")
        default = of_checkpoint or _shown_default(schema.default(name), description)
        repeat: dict[str, Any] = {"action": "append"} if is_repeatable(field.annotation) else {}
        group.add_argument(
            flag(name),
            dest=f"field:{name}",
            default=argparse.SUPPRESS,
            metavar=field.title or _metavar(field.annotation),
            help=argparse.SUPPRESS if hidden else f"{description} [{default}]",
            **repeat,
        )


def _metavar(annotation: Any) -> str:
    if is_repeatable(annotation):
        return "TEXT" if get_origin(annotation) is tuple else "[KIND.]KEY=VALUE"
    kind = value_type(annotation)
    choices = get_args(kind)
    return "|".join(choices) or {int: "N", float: "F", bool: "0|1", Path: "PATH"}.get(kind, "NAME")


def _shown_default(value: Any, description: str) -> str:
    if value is None or value in ((), {}):
        return "auto" if "auto =" in description else "none"
    if isinstance(value, bool):
        return "1" if value else "0"
    return f"{value:g}" if isinstance(value, float) else str(value)


def run_config(arguments: argparse.Namespace) -> RunConfig:
    """The configuration file, then the flags: the one RunConfig of a command."""
    values = read_config_file(arguments.config) if arguments.config else {}
    return RunConfig(**{**values, **given_fields(arguments)})


def given_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    """The fields given as flags, by name."""
    flags = {key: text for key, text in vars(arguments).items() if key.startswith("field:") and text is not None}
    given = {key.removeprefix("field:"): text for key, text in flags.items()}
    return {name: _from_text(name, text) if name in RunConfig.model_fields else text for name, text in given.items()}


def _from_text(name: str, text: Any) -> Any:
    """A flag's text, or texts, for the schema, which is more lenient about booleans than the contract."""
    annotation = RunConfig.model_fields[name].annotation
    if is_repeatable(annotation):
        return tuple(text)
    if is_unset(name, text):
        return None
    if value_type(annotation) is bool:
        if text.lower() not in ("1", "0", "true", "false"):
            raise ConfigError(f"{flag(name)} {text!r}: expected {describe_bounds(RunConfig, name)}")
        return text.lower() in ("1", "true")
    return text
