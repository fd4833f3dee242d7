"""The configuration file of a run: TOML, YAML or JSON with the names of the flags."""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from protomamba.errors import ConfigError
from protomamba.run_config import RunConfig, is_unset
from protomamba.schema import describe_bounds, flag, nearest, value_type


def read_config_file(path: Path) -> dict[str, Any]:
    """The fields in a TOML, YAML or JSON file, under flag names or field names; an unknown one raises ConfigError."""
    parsers: dict[str, Callable[[str], Any]] = {
        ".toml": tomllib.loads,
        ".json": json.loads,
        ".yaml": yaml.safe_load,
        ".yml": yaml.safe_load,
    }
    parse: Callable[[str], Any] | None = parsers.get(path.suffix.lower())
    if parse is None:
        raise ConfigError(
            f"--config {path}: expected a .toml, .yaml or .json file, found {path.suffix or 'no extension'}"
        )
    try:
        values = parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise ConfigError(f"--config {path}: not valid {path.suffix[1:]}: {' '.join(str(error).split())}") from None
    if not isinstance(values, Mapping):
        raise ConfigError(f"--config {path}: expected names and values, found {type(values).__name__}")
    fields: dict[str, Any] = {}
    for key, value in values.items():
        name = _known_field(str(key), path)
        if name in fields:
            raise ConfigError(f"--config {path}: {name.replace('_', '-')}is given twice")
        fields[name] = _from_file(name, value)
    return fields


def _from_file(name: str, value: Any) -> Any:
    """A value of a file for the schema, which would take a boolean for a number and knows no auto."""
    annotation = RunConfig.model_fields[name].annotation
    if isinstance(value, bool) and value_type(annotation) in (int, float):
        raise ConfigError(f"{flag(name)} {value!r}: expected {describe_bounds(RunConfig, name)}")
    return None if is_unset(name, value) else _yaml_number(value)


def _yaml_number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as a string; what it plainly means is a number."""
    if isinstance(value, str):
        try:
            return float(value) if "e" in value.lower() and math.isfinite(float(value)) else value
        except ValueError:
            return value
    return value


def _known_field(key: str, path: Path) -> str:
    name = key.replace("-", "_")
    if name not in RunConfig.model_fields:
        names = [n.replace("_", "-") for n in RunConfig.model_fields]
        raise ConfigError(f"--config {path}: unknown key {key!r}{nearest(key.replace('_', '-'), names)}")
    return name
