"""Writes down what the kernel tests do with the native library, so that `runner.cpp` can do it again without Python.

A case is one test: the bytes of every tensor an op is given, the op's argument struct, and the float64 answers that
`closeness.assert_close` held the results against, with its tolerance.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, BinaryIO

import torch
from torch import Tensor

from protomamba.kernels import native
from protomamba.kernels.arguments import OPS
from tests.kernels.closeness import SMALLEST, TOLERANCES

MAGIC = b"PMCASES1"
POOL = -1
Addresses = list[tuple[int, int, int]]


def integers(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}q", *values)


def counted(data: bytes, element: int = 1) -> bytes:
    return integers(len(data) // element) + data


def doubles(x: Tensor) -> bytes:
    return counted(x.detach().double().contiguous().numpy().tobytes(), 8)


def content(memory: torch.UntypedStorage) -> bytes:
    return torch.tensor([], dtype=torch.uint8).set_(memory).numpy().tobytes()


@dataclass
class Buffer:
    """A tensor's whole memory, kept alive so that its address is not given out again; `known` is what it last held."""

    memory: torch.UntypedStorage
    holds_addresses: bool
    known: bytes | None = None

    def offset(self, address: int) -> int | None:
        """Where in it this address is, or None."""
        offset = address - self.memory.data_ptr()
        return offset if 0 <= offset < self.memory.nbytes() else None


@dataclass
class Recorder:
    """Records the calls of one library while tests run; `finish` writes a case if anything of it was judged."""

    library: native.Library
    file: BinaryIO
    cases: int = 0
    held: int = 0
    events: list[bytes] = field(default_factory=list)
    buffers: list[Buffer] = field(default_factory=list)

    def start(self) -> None:
        self.file.write(MAGIC + integers(native.ABI))
        self._pool = self.library._parallel_for
        pack = self.library.pack
        self.library.pack = partial(self._packed, pack)  # type: ignore[method-assign]
        for op in OPS:
            setattr(self.library, op, partial(self._called, op, getattr(self.library, op), pack))

    def _packed(self, pack: Any, op: str, **fields: Any) -> bytes:
        self._know(fields)
        packed: bytes = pack(op, **fields)
        return packed

    def _called(self, op: str, run: Any, pack: Any, **fields: Any) -> None:
        self._know(fields)
        packed = pack(op, **fields)
        addresses, used = self._addresses(packed)
        for buffer in used:
            self._upload(buffer)
        self.events.append(self._event("K", op, 0) + counted(packed) + counted(self._bytes(addresses), 24))
        run(**fields)
        for buffer in used:
            self.buffers[buffer].known = content(self.buffers[buffer].memory)

    def _know(self, fields: Mapping[str, Any]) -> None:
        for x in fields.values():
            if isinstance(x, Tensor) and self._find(x.data_ptr()) is None and x.untyped_storage().nbytes():
                words = x.dtype in (torch.int64, torch.uint8)
                self.buffers.append(Buffer(x.untyped_storage(), words))

    def _find(self, address: int) -> tuple[int, int] | None:
        for number, buffer in enumerate(self.buffers):
            if (offset := buffer.offset(address)) is not None:
                return number, offset
        return None

    def _addresses(self, data: bytes) -> tuple[Addresses, list[int]]:
        """Every word of `data` that is an address, and the buffers it leads to: those with addresses of others last."""
        found: Addresses = []
        used: list[int] = []
        for at in range(0, len(data) - 7, 8):
            (word,) = struct.unpack_from("<q", data, at)
            place = self._find(word)
            if word == self._pool:
                found.append((at, POOL, 0))
            elif place is not None:
                found.append((at, *place))
                used += self._reached(place[0])
        return found, list(dict.fromkeys(used))

    def _reached(self, number: int) -> list[int]:
        buffer = self.buffers[number]
        return [*(self._addresses(content(buffer.memory))[1] if buffer.holds_addresses else []), number]

    def _upload(self, number: int) -> None:
        buffer = self.buffers[number]
        now = content(buffer.memory)
        if now != buffer.known:
            addresses = self._addresses(now)[0] if buffer.holds_addresses else []
            self.events.append(self._event("B", "", number) + counted(now) + counted(self._bytes(addresses), 24))
            buffer.known = now

    def judged(
        self, actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], kind: str, dtype: torch.dtype
    ) -> None:
        """What `assert_close` was given: kept for the tensors that an op wrote and that nobody has changed since."""
        for name, x in actual.items():
            place = self._find(x.data_ptr()) if x.numel() else None
            if place is None or content(x.untyped_storage()) != self.buffers[place[0]].known:
                continue
            size = -x.element_size() if x.dtype == torch.int64 else x.element_size()  # below 0: whole numbers
            where = integers(place[1], size) + counted(integers(*x.shape), 8) + counted(integers(*x.stride()), 8)
            self._hold("E", name, place[0], b"", where, TOLERANCES[kind, dtype], expected[name])

    def map(self, which: int, name: str, x: Tensor, ulp: float, exact: Tensor) -> None:
        """A case of its own: function `which` of pm_map on x (float32), and its exact values."""
        self._hold("M", name, which, x.numpy().tobytes(), b"", ulp, exact)
        self.finish(f"map {name}")

    def _hold(
        self, kind: str, name: str, number: int, data: bytes, where: bytes, tolerance: float, exact: Tensor
    ) -> None:
        judgement = struct.pack("<2d", tolerance, SMALLEST) + doubles(exact)
        self.events.append(self._event(kind, name, number) + counted(data) + where + judgement)
        self.held += 1

    @staticmethod
    def _event(kind: str, name: str, number: int) -> bytes:
        return integers(ord(kind)) + counted(name.encode()) + integers(number)

    @staticmethod
    def _bytes(addresses: Addresses) -> bytes:
        return b"".join(integers(*address) for address in addresses)

    def finish(self, name: str, keep: bool = False) -> None:
        """Ends a case: written up to its last judgement, or dropped if there is none; with `keep` written whole."""
        judgements = [i for i, event in enumerate(self.events) if keep or event[0] in b"EM"]
        if judgements:
            kept = self.events[: judgements[-1] + 1]
            self.file.write(integers(1) + counted(name.encode()) + integers(len(kept)) + b"".join(kept))
            self.cases += 1
        self.events, self.buffers = [], []

    def close(self) -> None:
        self.file.write(integers(0))
