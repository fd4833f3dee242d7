"""Hostile variants of good files: bytes at random, and values at random inside JSON and npy headers."""

from __future__ import annotations

import io
import json
import math
import random
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np

Mutator = Callable[[bytes, random.Random], bytes]

NUMBERS = [
    0,
    1,
    -1,
    2,
    255,
    256,
    2**31 - 1,
    2**31,
    2**32,
    2**53,
    2**63 - 1,
    2**63,
    2**64,
    -(2**63) - 1,
    10**18,
    10**400,
]
WORDS = ["", "..", "../../etc/passwd", "/etc/passwd", "a/../../b", "\x00", "\udcff", "x" * 100_000, "nan", "$tensor"]
WORDS += ["<script>", "__class__", "os:system", "|touch x", "model.safetensors", "\u202e", "1e999", "-0", "\n\n"]
LITERALS = [b"NaN", b"Infinity", b"-Infinity", b"1e999", b"1e-999", b"-0.0", b"1" * 5_000, b'"\\ud800"', b"null", b"{}"]
LITERALS += [b"[]", b"true", b"0x10", b"1.0", b"1.5", b"'x'"]
DEEP = 100_000


def any_bytes(data: bytes, rng: random.Random) -> bytes:
    """One to four random changes of the bytes."""
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        data = rng.choice(_BYTE_CHANGES)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    if not data:
        return b"\x00"
    place = rng.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << rng.randrange(8)]) + data[place + 1 :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _remove(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start + rng.choice([1, 2, 8, 100]) :]


def _repeat(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + data[start : start + rng.choice([1, 8, 64])] * rng.choice([2, 50]) + data[start:]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    odd = [b"\x00" * 16, b"\xff" * 8, b"\n", b"\r", b",", b'"', b"\xef\xbb\xbf", b"\x80", b"1e999", b"-1", b" "]
    odd += [struct.pack("<Q", number % 2**64) for number in NUMBERS[:-1]]
    return data[:start] + rng.choice(odd) + data[start:]


def _overwrite(data: bytes, rng: random.Random) -> bytes:
    start, width = rng.randrange(len(data) + 1), rng.choice([1, 2, 4, 8])
    value = (rng.choice(NUMBERS[:-1]) % 2 ** (8 * width)).to_bytes(width, rng.choice(["little", "big"]))  # type: ignore[arg-type]
    return data[:start] + value + data[start + width :]


def _swap(data: bytes, rng: random.Random) -> bytes:
    a, b = sorted(rng.randrange(len(data) + 1) for _ in range(2))
    return data[b:] + data[a:b] + data[:a]


def _nothing(data: bytes, rng: random.Random) -> bytes:
    return rng.choice(
        [b"", b"\x00", b"\n", bytes(rng.randrange(256) for _ in range(40)), b"PK\x03\x04", b"\x80\x04\x95"]
    )


_BYTE_CHANGES: list[Mutator] = [_flip, _flip, _flip, _cut, _remove, _repeat, _insert, _overwrite, _overwrite, _swap]
_BYTE_CHANGES.append(_nothing)


def any_json(data: bytes, rng: random.Random) -> bytes:
    """A JSON text with values, keys or depths that its reader does not expect; else bytes at random."""
    try:
        value = json.loads(data)
    except ValueError:
        return any_bytes(data, rng)
    return json_of(value, rng)


def json_of(value: Any, rng: random.Random) -> bytes:
    """The text of a JSON value after one to three hostile changes inside it."""
    marks: dict[str, bytes] = {}
    for _ in range(rng.choice([1, 1, 2, 3])):
        value = _changed(value, rng, marks)
    text = json.dumps(value).encode()
    for mark, literal in marks.items():
        text = text.replace(f'"{mark}"'.encode(), literal)
    if rng.random() < 0.05:  # the same key twice
        text = re.sub(rb'("[^"]+": [^,{}\[\]]+)', rb"\1, \1", text, count=rng.choice([1, 5]))
    return text


def _changed(value: Any, rng: random.Random, marks: dict[str, bytes]) -> Any:
    """The value with one node changed, each node below being as likely as the next."""
    if isinstance(value, dict) and value and rng.random() < 0.85:
        key = rng.choice(list(value))
        changed = dict(value)
        match rng.randrange(12):
            case 0:
                del changed[key]
            case 1:
                changed[rng.choice(WORDS)] = changed.pop(key)
            case 2:
                changed[rng.choice(WORDS)] = _hostile(rng, marks)
            case _:
                changed[key] = _changed(value[key], rng, marks)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.85:
        place = rng.randrange(len(value))
        head, item, tail = value[:place], value[place], value[place + 1 :]
        ways = [[*head, *tail], [*head, item, item, *tail], [*head, _changed(item, rng, marks), *tail]]
        return rng.choice([*ways, ways[2], ways[2]])
    if isinstance(value, str) and value[:1] in ("{", "[") and rng.random() < 0.8:  # JSON within JSON
        try:
            return json_of(json.loads(value), rng).decode("utf-8", "replace")
        except ValueError:
            pass
    return _hostile(rng, marks, value)


def _hostile(rng: random.Random, marks: dict[str, bytes], former: Any = None) -> Any:
    kind = rng.randrange(9)
    if kind == 0:
        return rng.choice([None, True, False, [], {}, "", [former], {"x": former}])
    if kind == 1:
        return rng.choice(WORDS)
    if kind == 2 and isinstance(former, int | float):
        return rng.choice([former + 1, former - 1, -former, former * 2, 0.5, [former] * 3, "1"])
    if kind == 3 and isinstance(former, str):
        return any_bytes(former.encode("utf-8", "surrogatepass"), rng).decode("utf-8", "surrogateescape")
    if kind == 4 and rng.random() < 0.1:
        mark = f"mark-{rng.random()}"
        opening, closing = rng.choice([(b"[", b"]"), (b'{"a":', b"}")])
        marks[mark] = opening * DEEP + b"1" + closing * DEEP
        return mark
    if kind in (4, 5):
        mark = f"mark-{rng.random()}"
        marks[mark] = rng.choice(LITERALS)
        return mark
    return rng.choice(NUMBERS[:-1] if rng.random() < 0.9 else NUMBERS[-1:])


def json_lines(data: bytes, rng: random.Random) -> bytes:
    """Lines of which one is changed as JSON."""
    lines = data.split(b"\n")
    place = rng.randrange(len(lines))
    return b"\n".join([*lines[:place], any_json(lines[place], rng), *lines[place + 1 :]])


def npy(shape: tuple[int, ...]) -> bytes:
    """A good .npy file of small tokens."""
    file = io.BytesIO()
    np.save(file, (np.arange(math.prod(shape)) % 11).reshape(shape).astype(np.int32))
    return file.getvalue()


def npy_header(data: bytes, rng: random.Random) -> bytes:
    """An npy file whose header claims another element type, order, shape, length or version."""
    if len(data) < 10:
        return any_bytes(data, rng)
    length = struct.unpack("<H", data[8:10])[0]
    header, body = data[10 : 10 + length], data[10 + length :]
    shapes = ["()", "(0,)", "(1000000000000000000,)", "(-1,)", "(2, 2, 2)", "(1.5,)", "('x',)", "(True,)", "(0, 2**62)"]
    shapes += ["(99999999999, 99999999999)", "(" * 200 + ")" * 200, "[3]", "(9223372036854775807,)", "None"]
    kinds = [
        "'|O'",
        "'<f8'",
        "'<i8'",
        "'>i4'",
        "'<u1'",
        "'|S1000000000'",
        "'<U99999999'",
        "[('a', '<i4')]",
        "'<M8[ns]'",
    ]
    kinds += ["'|V0'", "'x'", "1", "{}", "'<i4" + "x" * 9_999 + "'", "'|b1'", "'<c16'", "None"]
    way = rng.randrange(6)
    if way == 0:
        header = re.sub(rb"'shape': \([^)]*\)", b"'shape': " + rng.choice(shapes).encode(), header)
    elif way == 1:
        header = re.sub(rb"'descr': '[^']*'", b"'descr': " + rng.choice(kinds).encode(), header)
    elif way == 2:
        header = header.replace(b"False", rng.choice([b"True", b"1", b"None", b"'x'", b"__import__('os')"]))
    elif way == 3:
        header = rng.choice(
            [b"{}", b"[]", b"{'descr': '<i4'}", b"(" * 9_000, b"-" * 9_000 + b"1", b"\x00" * 50, b"{" * 99]
        )
    elif way == 4:
        return data[:6] + bytes([rng.choice([0, 1, 2, 3, 4, 255]), rng.randrange(3)]) + data[8:]
    else:
        return data[:8] + struct.pack("<H", rng.randrange(65_536)) + data[10:]
    return data[:8] + struct.pack("<H", min(len(header), 65_535)) + header[:65_535] + body


def safetensors_header(data: bytes, rng: random.Random) -> bytes:
    """A safetensors file whose JSON header is changed and its length made to fit."""
    length = int.from_bytes(data[:8], "little")
    body = any_json(data[8 : 8 + length], rng)
    return len(body).to_bytes(8, "little") + body + data[8 + length :]


def either(*mutators: Mutator) -> Mutator:
    """One of them, drawn for each file."""
    return lambda data, rng: rng.choice(mutators)(data, rng)
