"""One atomic, checksummed, versioned file that holds all of a run. See `checkpoint_format` for its bytes.

A checkpoint maps names to parts. A part is whatever `state_dict()` of a `Stateful` returns: nested dicts, lists and
tuples of tensors and plain values. This file knows none of the parts, and the parts know nothing of the file.
"""

from __future__ import annotations

import os
import time
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from torch import Tensor

from protomamba.checkpoint import layout
from protomamba.checkpoint.encode import TreeEncoder, decode, tensor_names
from protomamba.checkpoint.layout import CheckpointError, Header, TensorRecord
from protomamba.checkpoint.migrations import MIGRATIONS
from protomamba.errors import MALFORMED, UserError
from protomamba.storage import DISK, Disk, DurabilityUnknownError, NotCommittedError, PathText, SaveError, commit

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "DurabilityUnknownError",
    "NotCommittedError",
    "SaveError",
    "SaveReport",
    "Stateful",
    "describe_checkpoint",
    "estimate_bytes",
    "load",
    "read_info",
    "save",
    "verify",
]


class Stateful(Protocol):
    """What must survive a restart. `load_state_dict` gets back what `state_dict` returned, tensors in fresh memory."""

    def state_dict(self) -> Mapping[str, Any]: ...

    def load_state_dict(self, state: Any, /) -> Any: ...


@dataclass(frozen=True)
class SaveReport:
    """What a save wrote; `save_ms` is wall time, the wait for the disk included."""

    path: Path
    bytes: int
    save_ms: float


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint. `info` is what the saver noted for people and for choosing among files: step, val_loss."""

    config: dict[str, Any]
    parts: dict[str, dict[str, Any]]
    info: dict[str, Any]
    version: int

    def section(self, name: str) -> dict[str, Any]:
        """A part of the configuration. UserError where the file has no such names and values."""
        return _named("configuration", name, self.config)

    def part(self, name: str) -> dict[str, Any]:
        """A part of the state. UserError where the file has none of this name."""
        return _named("state", name, self.parts)


def _named(of: str, name: str, all_of: Mapping[str, Any]) -> dict[str, Any]:
    found = all_of.get(name)
    if not isinstance(found, dict):
        raise UserError(f"the checkpoint's {of} has no {name!r}: it was written by another program, or changed")
    return found


# What a file of version n lacks to be one of version n + 1 is done by MIGRATIONS[n], on the decoded parts and config.
FORMAT_VERSION = 2


def save(
    path: str | os.PathLike[str],
    parts: Mapping[str, Mapping[Any, Any]],
    *,
    config: Mapping[str, Any],
    info: Mapping[str, Any] | None = None,
    disk: Disk = DISK,
) -> SaveReport:
    """Save `parts` as the one file `path`: after this returns, the new content survives a kill and a power cut.

    Tensors are read in place, one at a time; they must not change meanwhile. Raises NotCommittedError (what was at
    `path` still is) or DurabilityUnknownError (the new file is there), both SaveError; TypeError for a state that holds
    anything but tensors and plain values.
    """
    started = time.perf_counter()
    path = Path(path)
    metadata, tensors = _encode(parts, config, info or {})
    crcs = {name: zlib.crc32(layout.tensor_bytes(tensor)) for name, tensor in tensors.items()}
    try:
        head = layout.build_header(metadata, tensors, crcs)
    except ValueError as error:
        raise NotCommittedError(f"{path}: not saved: {error}") from error
    size = len(head) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())

    def chunks() -> Iterator[memoryview]:
        yield memoryview(head)
        yield from (layout.tensor_bytes(tensor) for tensor in tensors.values())

    commit(path, size, chunks(), disk)
    return SaveReport(path, size, (time.perf_counter() - started) * 1e3)


def estimate_bytes(parts: Mapping[str, Mapping[Any, Any]], *, config: Mapping[str, Any]) -> int:
    """The size a save of these parts would have, without reading their data."""
    metadata, tensors = _encode(parts, config, {})
    head = layout.build_header(metadata, tensors, dict.fromkeys(tensors, 0))
    return len(head) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _encode(
    parts: Mapping[str, Mapping[Any, Any]], config: Mapping[str, Any], info: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    encoder, plain = TreeEncoder(), TreeEncoder()
    metadata = {
        "version": FORMAT_VERSION,
        "config": plain.encode(config, "config"),
        "info": plain.encode(info, "info"),
        "parts": {name: encoder.encode(state, name) for name, state in parts.items()},
    }
    if plain.tensors:
        raise TypeError(f"{next(iter(plain.tensors))}: config and info hold plain values only, not tensors")
    return metadata, layout.in_file_order(encoder.tensors)


def load(path: str | os.PathLike[str]) -> Checkpoint:
    """Read a checkpoint, every byte of it verified before anything is returned.

    Raises CheckpointError naming the file and the part that is missing, damaged, foreign or too new.
    """
    path = Path(path)
    with _open(path) as (file, header):
        tensors = {}
        for record in header.tensors:
            tensors[record.name], good = layout.read_tensor(path, file, record)
            if not good:
                raise CheckpointError(path, record.part, _damaged(record))
    return _migrate(path, _decode(path, header, tensors))


def read_info(path: str | os.PathLike[str]) -> dict[str, Any]:
    """`Checkpoint.info` alone: reads and verifies the header, not the tensors. CheckpointError as for `load`."""
    with _open(path) as (_, header):
        return dict(decode(header.info, {}))


class _open:
    """A checkpoint opened for reading with its header verified; errors of the system become CheckpointError."""

    def __init__(self, path: PathText) -> None:
        self.path = path

    def __enter__(self) -> tuple[BinaryIO, Header]:
        try:
            self.file: BinaryIO = open(self.path, "rb", buffering=0)
        except OSError as error:
            inside = Path(self.path) / "latest.safetensors"
            hint = f"; it is a run's folder, give {inside}" if inside.is_file() else ""
            raise CheckpointError(self.path, "file", f"cannot be opened: {error.strerror}{hint}") from error
        try:
            header = layout.read_header(self.path, self.file, os.fstat(self.file.fileno()).st_size)
            _check_version(self.path, header.version)
        except BaseException as error:
            self.file.close()
            if isinstance(error, OSError):
                raise self._unreadable(error) from error
            raise
        return self.file, header

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        self.file.close()
        if isinstance(error, OSError):
            raise self._unreadable(error) from error

    def _unreadable(self, error: OSError) -> CheckpointError:
        return CheckpointError(self.path, "file", f"cannot be read: {error.strerror}")


def _check_version(path: PathText, version: int) -> None:
    if version > FORMAT_VERSION:
        raise CheckpointError(
            path,
            "version",
            f"format {version}, and this protomamba reads versions up to {FORMAT_VERSION}: use a newer protomamba",
        )
    # The first that is missing ends it: a file may claim version -2^63.
    missing = next((v for v in range(version, FORMAT_VERSION) if v not in MIGRATIONS), None)
    if missing is not None:
        raise CheckpointError(path, "version", f"format {version}, and there is no migration from {missing}")


def _decode(path: Path, header: Header, tensors: Mapping[str, Tensor]) -> Checkpoint:
    try:
        config, info = _mapping(decode(header.config, {})), _mapping(decode(header.info, {}))
        parts = {name: _mapping(decode(node, tensors)) for name, node in _mapping(header.parts).items()}
        return Checkpoint(config, parts, info, header.version)
    except MALFORMED as error:
        raise CheckpointError(path, "header", f"malformed ({type(error).__name__}: {error})") from error


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"a mapping was expected, not {type(value).__name__}")
    return value


def _migrate(path: Path, checkpoint: Checkpoint) -> Checkpoint:
    for version in range(checkpoint.version, FORMAT_VERSION):
        try:
            parts, config = MIGRATIONS[version](checkpoint.parts, checkpoint.config)
            checkpoint = replace(checkpoint, parts=parts, config=config, version=version + 1)
        except MALFORMED as error:
            raise CheckpointError(path, "version", f"migration from format {version} failed: {error!r}") from error
    return checkpoint


def _damaged(record: TensorRecord) -> str:
    return f"tensor {record.name!r} is damaged (its checksum does not match); use an older checkpoint"


def verify(path: str | os.PathLike[str]) -> list[str]:
    """Every problem of a checkpoint, one line each; empty if it is whole. Never raises for a damaged file."""
    try:
        description = describe_checkpoint(path)
    except CheckpointError as error:
        return [str(error)]
    return [
        f"{path}: {tensor['part']}: tensor {tensor['name']!r} is damaged"
        for tensor in description["tensors"]
        if not tensor["ok"]
    ]


def describe_checkpoint(path: str | os.PathLike[str]) -> dict[str, Any]:
    """What is in a checkpoint, as plain values: version, bytes, info, config, parts, and each tensor with its check.

    A damaged tensor is reported as `"ok": False`; a damaged header, or a foreign file, raises CheckpointError.
    """
    path = Path(path)
    tensors = []
    with _open(path) as (file, header):
        for record in header.tensors:
            _, good = layout.read_tensor(path, file, record)
            tensors.append(_describe(record, good))
    by_name = {tensor["name"]: tensor for tensor in tensors}
    checkpoint = _decode(path, header, by_name)  # type: ignore[arg-type]  # tensors shown as their descriptions
    return {
        "path": str(path),
        "bytes": header.data_start + header.data_bytes,
        "version": header.version,
        "info": checkpoint.info,
        "config": checkpoint.config,
        "ok": all(tensor["ok"] for tensor in tensors),
        "parts": {
            part: {"tensors": len(names), "bytes": sum(by_name[name]["bytes"] for name in set(names))}
            for part, names in ((part, tensor_names(node)) for part, node in header.parts.items())
        },
        "tensors": tensors,
    }


def _describe(record: TensorRecord, good: bool) -> dict[str, Any]:
    return {
        "name": record.name,
        "part": record.part,
        "shape": list(record.shape),
        "dtype": str(record.dtype).removeprefix("torch."),
        "bytes": record.end - record.begin,
        "ok": good,
    }
