"""Nested state to and from plain JSON plus a flat table of named tensors. No pickle: only the types below exist.

A node is written as
    None, bool, str, finite float, 64-bit int   itself
    other int                                   {"$int": "0x..."}        (JSON readers and Python bound decimal digits)
    nan, inf, -inf                              {"$float": "nan"}        (JSON has no word for them)
    list                                        [...]
    tuple                                       {"$tuple": [...]}
    dict with str keys, none starting with $    {...}
    other dict with str and int keys            {"$items": [[key, value], ...]}     (optimizers number their parameters)
    tensor                                      {"$tensor": name}
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Json = Any
_INT64 = 2**63


class TreeEncoder:
    """Turns states into JSON and collects their tensors in `tensors`, one entry per distinct piece of memory."""

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._name_of: dict[tuple[Any, ...], str] = {}

    def encode(self, value: object, where: str) -> Json:
        """The JSON node of `value`; `where` is its dotted place, which names its tensors. TypeError for other types."""
        match value:
            case None | bool() | str():
                return value
            case Tensor():
                return {"$tensor": self._register(value.detach(), where)}
            case int():
                return int(value) if -_INT64 <= value < _INT64 else {"$int": hex(value)}
            case float():
                return float(value) if math.isfinite(value) else {"$float": repr(float(value))}
            case list():
                return [self.encode(item, f"{where}.{i}") for i, item in enumerate(value)]
            case tuple():
                return {"$tuple": [self.encode(item, f"{where}.{i}") for i, item in enumerate(value)]}
            case Mapping():
                return self._encode_mapping(value, where)
        raise TypeError(f"{where}: a state holds tensors and plain values, not {type(value).__name__}")

    def _encode_mapping(self, value: Mapping[Any, object], where: str) -> Json:
        for key in value:
            if not isinstance(key, str | int) or isinstance(key, bool):
                raise TypeError(f"{where}: the keys of a state are str or int, not {type(key).__name__} ({key!r})")
        nodes = [(key, self.encode(item, f"{where}.{key}")) for key, item in value.items()]
        if all(isinstance(key, str) and not key.startswith("$") for key in value):
            return dict(nodes)
        return {"$items": [[self.encode(key, where), node] for key, node in nodes]}

    def _register(self, tensor: Tensor, where: str) -> str:
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            raise TypeError(f"{where}: only dense tensors with data can be saved")
        # Tied tensors are stored once and come back tied. Tensors that merely overlap are stored each in full.
        memory = (tensor.data_ptr(), tensor.device, tensor.dtype, tensor.shape, tensor.stride(), tensor.is_conj())
        if tensor.numel() and memory in self._name_of:
            return self._name_of[memory]
        name = self._free_name(where)
        self.tensors[name] = tensor
        self._name_of[memory] = name
        return name

    def _free_name(self, where: str) -> str:
        # The names must be valid UTF-8 in the file; {"a.b": x} and {"a": {"b": x}} would share one.
        base = where.encode("utf-8", "backslashreplace").decode()
        name, n = base, 1
        while name in self.tensors:
            n += 1
            name = f"{base}#{n}"
        return name


def decode(node: Json, tensors: Mapping[str, Tensor]) -> Any:
    """The value of a node made by `TreeEncoder.encode`. KeyError or ValueError if it was not."""
    if isinstance(node, list):
        return [decode(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if len(node) != 1 or not next(iter(node)).startswith("$"):
        return {key: decode(item, tensors) for key, item in node.items()}
    (kind, content), *_ = node.items()
    match kind:
        case "$tensor":
            return tensors[content]
        case "$int":
            return int(content, 16)
        case "$float":
            return float(content)
        case "$tuple":
            return tuple(decode(item, tensors) for item in content)
        case "$items":
            return {decode(key, tensors): decode(item, tensors) for key, item in content}
    raise ValueError(f"unknown kind of value {kind!r}")


def tensor_names(node: Json) -> list[str]:
    """The tensors a node refers to, in order, repeated where they are tied."""
    if isinstance(node, list):
        return [name for item in node for name in tensor_names(item)]
    if not isinstance(node, dict):
        return []
    if set(node) == {"$tensor"}:
        return [node["$tensor"]]
    return [name for item in node.values() for name in tensor_names(item)]
