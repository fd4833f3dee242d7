"""The bytes of a checkpoint: a safetensors file whose header also carries the state's plain values and all checksums.

    8 bytes      length N of the header, little-endian
    N bytes      {"__metadata__":{"protomamba.checksum":"<64 hex digits>", ...}, tensor: {dtype, shape, offsets}, ...}
    the rest     the tensors, one after the other, nothing between and nothing behind

Every byte is covered: a BLAKE2b of length and header (its own digits taken as zeros), a CRC-32 of every tensor, kept in
the header, and the file's length. CRC-32 because it finds every burst of up to 32 bits and costs a fifth of writing the
file, where SHA-256 and BLAKE2b cost 0.6 to 0.9 of it; accidents are to be detected, nobody is kept from forging a file.

We write the layout ourselves, not through `safetensors.torch.save_file`: the header must hold checksums of itself and
of the data, tensors go to the disk one at a time without a copy, and each system call passes through `storage.Disk`.
Stock safetensors reads the result. Checksum and version keep their place in all versions to come.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from protomamba.checkpoint.encode import Json
from protomamba.errors import MALFORMED, UserError
from protomamba.storage import PathText

# The bound of the stock library; a length beyond it is damage or another format, and nothing is allocated for it.
MAX_HEADER_BYTES = 100_000_000
_PREFIX = b'{"__metadata__":{"protomamba.checksum":"'
_DIGITS = 64
_ZEROS = b"0" * _DIGITS

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


class CheckpointError(UserError):
    """A checkpoint cannot be used. `path` is the file, `part` what is wrong in it ("header", "length" or a part)."""

    def __init__(self, path: PathText, part: str, problem: str) -> None:
        super().__init__(f"{path}: {part}: {problem}")
        self.path, self.part = Path(path), part


@dataclass(frozen=True)
class TensorRecord:
    """One tensor of the file; `begin` and `end` are offsets behind the header, `crc` its CRC-32."""

    name: str
    part: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int
    crc: int


@dataclass(frozen=True)
class Header:
    """A verified header. `parts`, `config` and `info` are still nodes of `state_tree`."""

    version: int
    config: Json
    info: Json
    parts: dict[str, Json]
    tensors: list[TensorRecord]
    data_start: int
    data_bytes: int


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in row-major order: its own memory when it is a contiguous CPU tensor, else a copy."""
    flat = tensor.cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return memoryview(flat.view(torch.uint8).numpy())  # type: ignore[arg-type]  # numpy declares no Buffer before 3.12


def in_file_order(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Widest element type first, so that every tensor of the file is aligned to its elements."""
    return dict(sorted(tensors.items(), key=lambda item: -item[1].element_size()))


def build_header(metadata: Mapping[str, Json], tensors: Mapping[str, Tensor], crcs: Mapping[str, int]) -> bytes:
    """Length and header of a file with these tensors in this order; `metadata` are nodes of `state_tree`."""
    entries: dict[str, Json] = {}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPE_NAMES:
            raise TypeError(f"{name}: safetensors has no element type {tensor.dtype}")
        begin, end = end, end + tensor.numel() * tensor.element_size()
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    texts = {f"protomamba.{key}": _dumps(node) for key, node in metadata.items()}
    texts["protomamba.crc32"] = _dumps({name: f"{crc:08x}" for name, crc in crcs.items()})
    first = {"protomamba.checksum": _ZEROS.decode(), "format": "pt"}
    body = _dumps({"__metadata__": {**first, **texts}, **entries}).encode()
    body += b" " * (-len(body) % 8)
    if len(body) > MAX_HEADER_BYTES:
        raise ValueError(f"the plain values of the state take {len(body):,} bytes; {MAX_HEADER_BYTES:,} is the bound")
    head = len(body).to_bytes(8, "little") + body
    start = 8 + len(_PREFIX)
    return head[:start] + _digest(head).encode() + head[start + _DIGITS :]


def _dumps(node: Json) -> str:
    return json.dumps(node, separators=(",", ":"), allow_nan=False)


def _digest(head: bytes) -> str:
    """BLAKE2b of length and header with the digits of the checksum taken as zeros."""
    start = 8 + len(_PREFIX)
    hash_ = hashlib.blake2b(head[:start], digest_size=_DIGITS // 2)
    hash_.update(_ZEROS)
    hash_.update(head[start + _DIGITS :])
    return hash_.hexdigest()


def read_header(path: PathText, file: BinaryIO, file_bytes: int) -> Header:
    """Read and verify everything in front of the tensors, and the file's length. CheckpointError on any deviation."""
    head = _read_head(path, file, file_bytes)
    start = 8 + len(_PREFIX)
    if head[8:start] != _PREFIX:
        raise CheckpointError(
            path, "header", "not a checkpoint of protomamba (other safetensors hold weights only), or damaged"
        )
    if head[start : start + _DIGITS] != _digest(head).encode():
        raise CheckpointError(path, "header", "damaged (its checksum does not match); use an older checkpoint")
    try:
        header = _parse(json.loads(head[8:]), len(head))
    except MALFORMED as error:
        raise CheckpointError(path, "header", f"malformed ({type(error).__name__}: {error})") from error
    expected = header.data_start + header.data_bytes
    if file_bytes != expected:
        raise CheckpointError(path, "length", f"{file_bytes:,} bytes, expected {expected:,}: truncated or overwritten")
    return header


def _read_head(path: PathText, file: BinaryIO, file_bytes: int) -> bytes:
    length_bytes = file.read(8)
    length = int.from_bytes(length_bytes, "little")
    if not 0 < length <= min(MAX_HEADER_BYTES, file_bytes - 8):
        raise CheckpointError(path, "header", _what_else(length_bytes))
    body = file.read(length)
    if len(body) < length:
        raise CheckpointError(path, "header", "the file ends inside it")
    return length_bytes + body


def _what_else(start: bytes) -> str:
    """Why a file with an impossible header length is refused. Every pickle has one: it starts with large bytes."""
    if start.startswith(b"PK"):
        return "a zip archive, as torch.save writes: it holds pickle, which can run code and is never read"
    if start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        return "a pickle: it can run code and is never read; save the weights as safetensors"
    return "not a safetensors file, truncated, or its length field is damaged"


def _parse(document: dict[str, Any], data_start: int) -> Header:
    metadata = document.pop("__metadata__")
    texts = {key.removeprefix("protomamba."): text for key, text in metadata.items() if key.startswith("protomamba.")}
    crcs = json.loads(texts["crc32"])
    parts = json.loads(texts["parts"])
    tensors = [_record(name, entry, int(crcs[name], 16), parts) for name, entry in document.items()]
    end = 0
    for record in tensors:
        if record.begin != end:
            raise ValueError(f"{record.name} begins at {record.begin}, expected {end}")
        end = record.end
    return Header(
        version=int(texts["version"]),
        config=json.loads(texts["config"]),
        info=json.loads(texts["info"]),
        parts=parts,
        tensors=tensors,
        data_start=data_start,
        data_bytes=end,
    )


def _record(name: str, entry: dict[str, Any], crc: int, parts: Iterable[str]) -> TensorRecord:
    dtype, shape = _DTYPES[entry["dtype"]], tuple(entry["shape"])
    begin, end = entry["data_offsets"]
    count = dtype.itemsize
    for size in shape:
        if not isinstance(size, int) or size < 0:
            raise ValueError(f"{name} has shape {shape}")
        count *= size
    if end - begin != count:
        raise ValueError(f"{name} takes {end - begin} bytes, its shape {count}")
    part = max((part for part in parts if name.startswith(f"{part}.")), key=len, default="?")
    return TensorRecord(name, part, dtype, shape, begin, end, crc)


def read_tensor(path: PathText, file: BinaryIO, record: TensorRecord) -> tuple[Tensor, bool]:
    """The next tensor of the file in memory of its own, and whether its bytes are the ones that were written."""
    tensor = torch.empty(record.shape, dtype=record.dtype)
    data = tensor_bytes(tensor)
    view = data
    while view:
        got = file.readinto(view)  # type: ignore[attr-defined]
        if not got:
            raise CheckpointError(path, record.part, f"the file ends inside tensor {record.name!r}")
        view = view[got:]
    return tensor, zlib.crc32(data) == record.crc
