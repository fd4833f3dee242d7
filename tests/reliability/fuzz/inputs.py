"""The readers of `prepare` and `predict`: tables, series, FASTA, compressed or not, and the folders made of them."""

from __future__ import annotations

import gzip
import io
import json
import random
import shutil
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.reliability.fuzz import mutate
from tests.reliability.fuzz.mutate import Mutator
from tests.reliability.fuzz.reader import Reader, file_of

BYTES, JSON, LINES = mutate.any_bytes, mutate.any_json, mutate.json_lines
ROWS = [(n % 4, (n * 7) % 11, n) for n in range(40)]  # user, item, time


def _out(path: Path) -> Path:
    shutil.rmtree(path.parent / "out", ignore_errors=True)
    return path.parent / "out"


def prepare_it(path: Path, **options: Any) -> None:
    """Token shards of a file, as `protomamba prepare texts` makes them."""
    from protomamba.data.prepare import prepare

    prepare([path], _out(path), **options)


def _events(path: Path) -> None:
    from protomamba.data.events import EventOptions, prepare_events

    prepare_events([path], _out(path), EventOptions("user", "item", "time", min_count=1))


def _label_series(path: Path) -> None:
    from protomamba.data.labelled_tables import LabelColumns
    from protomamba.data.prepare_labels import prepare_labels

    prepare_labels([path], _out(path), LabelColumns())


def _label_table(path: Path) -> None:
    from protomamba.data.labelled_tables import LabelColumns
    from protomamba.data.prepare_labels import prepare_labels

    prepare_labels([path], _out(path), LabelColumns(label="label", values=("v*",)))


def _label_lists(path: Path) -> None:
    from protomamba.data.labelled_tables import LabelColumns
    from protomamba.data.prepare_labels import prepare_labels

    prepare_labels([path], _out(path), LabelColumns(label="label", tokens="tokens"))


def _fasta(path: Path) -> None:
    from protomamba.data.fasta import prepare_fasta

    prepare_fasta([path], _out(path), kmer=2)


def _rows(path: Path) -> None:
    from protomamba.predict.rows import read_rows

    for _ in read_rows(path):
        pass


def _series_rows(path: Path) -> None:
    from protomamba.predict.series import series_rows

    for _ in series_rows(path, {"mean": [0.0], "std": [1.0]}):
        pass


# Good files


def _csv(names: str, rows: list[tuple[Any, ...]]) -> bytes:
    return "\n".join([names, *(",".join(map(str, row)) for row in rows), ""]).encode()


def _parquet(columns: dict[str, list[Any]]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.table(columns), folder / "t.parquet")
        return folder / "t.parquet"

    return make


def _npz() -> bytes:
    file = io.BytesIO()
    np.savez(file, X=np.arange(72, dtype=np.float32).reshape(6, 6, 2), y=np.arange(6) % 2, lengths=np.full(6, 5))
    return file.getvalue()


def _zst(content: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.compress(content, codec="zstd", asbytes=True))


def _unzst(data: bytes) -> bytes:
    import pyarrow

    return bytes(pyarrow.input_stream(io.BytesIO(data), compression="zstd").read())


def _zst_file(name: str, content: bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(_zst(content))
        return folder / name

    return make


EVENTS = _csv("user,item,time", ROWS)
FASTA = b"".join(b">record %d\nACGTNACGTRYK\nacgtacgtac\n" % n for n in range(8))
TS = b"@problemName x\n@timeStamps false\n@classLabel true a b\n@data\n" + b"".join(
    b"1.0,2.5,?:3,4,5:%s\n" % (b"a", b"b")[n % 2] for n in range(8)
)
_JSONL = b"".join(json.dumps({"text": f"entry {n} ☃", "label": n}).encode() + b"\n" for n in range(12))
_EVENT_LINES = b"".join(
    json.dumps(dict(zip(("user", "item", "time"), row, strict=True))).encode() + b"\n" for row in ROWS
)
_LISTS = b"".join(json.dumps({"tokens": [str(n), "a"], "label": n % 2}).encode() + b"\n" for n in range(8))
_LABELLED = _csv("label,v1,v2,v3", [("ab"[n % 2], n, n / 2, "") for n in range(8)])


# Mutators of packed files


def _bomb(rng: random.Random) -> bytes:
    """Much of little: a value, a line or a header without an end."""
    return rng.choice([b"1", b" ", b"A", b'"', b"\n", b"[", b"1,", b"@x\n", b">\n"]) * rng.choice([10**6, 10**7])


def packed(pack: Callable[[bytes], bytes], unpack: Callable[[bytes], bytes], inner: Mutator) -> Mutator:
    """Change what is inside a compressed file, seldom into something that is large once it is unpacked."""

    def change(data: bytes, rng: random.Random) -> bytes:
        content = inner(unpack(data), rng)
        if rng.random() < 0.002:
            place = rng.randrange(len(content) + 1)
            content = content[:place] + _bomb(rng) + content[place:]
        packed = pack(content)
        return packed + packed if rng.random() < 0.1 else packed

    return change


def _gz(content: bytes) -> bytes:
    return gzip.compress(content, 6, mtime=0)


def npz_member(data: bytes, rng: random.Random) -> bytes:
    """An archive in which one array's header or bytes, a name, or the archive's own account of a member is another."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    victim = rng.choice(list(members))
    way = rng.randrange(5)
    if way < 3:
        members[victim] = rng.choice([mutate.npy_header, mutate.npy_header, BYTES])(members[victim], rng)
    elif way == 3:
        members[rng.choice(["X", "../X.npy", "/X.npy", "y.npy", " ", "a\x00.npy", "X.npy"])] = members.pop(victim)
    method = rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    made = file.getvalue()
    return _other_account(made, rng) if way == 4 else made


def _other_account(data: bytes, rng: random.Random) -> bytes:
    """A field of the archive's central directory changed: method, sizes, flags, offset of a member."""
    entry = data.index(b"PK\x01\x02")
    place, width = rng.choice([(8, 2), (10, 2), (16, 4), (20, 4), (24, 4), (28, 2), (30, 2), (42, 4)])
    value = rng.choice([0, 1, 8, 12, 14, 99, 2**16 - 1, 2**31, 2**32 - 1]) % 2 ** (8 * width)
    return data[: entry + place] + struct.pack({2: "<H", 4: "<I"}[width], value) + data[entry + place + width :]


# Folders that `prepare` made


def _prepared(make: Callable[[Path], Path], read: Callable[[Path], None]) -> Callable[[Path], Path]:
    def prepared(folder: Path) -> Path:
        read(make(folder))
        return folder / "out" / "manifest.json"

    return prepared


def _open_prepared(path: Path) -> None:
    from protomamba.data.prepared import open_prepared

    whole = open_prepared(path.parent)
    for part in (whole.training, *whole.held_out.values()):
        part.check(vocab_size=2**31, classes=2**31, seq_len=2**31)


_MANIFEST = mutate.either(BYTES, JSON, JSON)
_PARQUET_EVENTS = _parquet({name: [row[at] for row in ROWS] for at, name in enumerate(("user", "item", "time"))})
_GZ_LINES = mutate.either(BYTES, packed(_gz, gzip.decompress, BYTES), packed(_gz, gzip.decompress, LINES))
_GZ_BYTES = mutate.either(BYTES, packed(_gz, gzip.decompress, BYTES))
_ZST_BYTES = mutate.either(BYTES, packed(_zst, _unzst, BYTES))

INPUTS: dict[str, Reader] = {
    "text": Reader(file_of("t.txt", "text é ☃\n".encode() * 30), prepare_it, BYTES),
    "jsonl": Reader(file_of("t.jsonl", _JSONL), prepare_it, mutate.either(BYTES, LINES)),
    "jsonl gz": Reader(file_of("t.jsonl.gz", _gz(_JSONL)), prepare_it, _GZ_LINES),
    "parquet": Reader(_parquet({"text": [f"line {n}" for n in range(50)], "n": [*range(50)]}), prepare_it, BYTES, True),
    "events csv": Reader(file_of("t.csv", EVENTS), _events, BYTES, True),
    "events csv zst": Reader(_zst_file("t.csv.zst", EVENTS), _events, _ZST_BYTES, True),
    "events jsonl": Reader(file_of("t.jsonl", _EVENT_LINES), _events, mutate.either(BYTES, LINES), True),
    "events parquet": Reader(_PARQUET_EVENTS, _events, BYTES, True),
    "events manifest": Reader(_prepared(file_of("t.csv", EVENTS), _events), _open_prepared, _MANIFEST),
    "labels ts": Reader(file_of("t.ts", TS), _label_series, BYTES),
    "labels ts gz": Reader(file_of("t.ts.gz", _gz(TS)), _label_series, _GZ_BYTES),
    "labels npz": Reader(file_of("t.npz", _npz()), _label_series, mutate.either(BYTES, npz_member, npz_member)),
    "labels csv": Reader(file_of("t.csv", _LABELLED), _label_table, BYTES, True),
    "labels jsonl": Reader(file_of("t.jsonl", _LISTS), _label_lists, mutate.either(BYTES, LINES), True),
    "labels manifest": Reader(_prepared(file_of("t.ts", TS), _label_series), _open_prepared, _MANIFEST),
    "fasta": Reader(file_of("t.fa", FASTA), _fasta, BYTES),
    "fasta gz": Reader(file_of("t.fa.gz", _gz(FASTA)), _fasta, _GZ_BYTES),
    "fasta zst": Reader(_zst_file("t.fa.zst", FASTA), _fasta, _ZST_BYTES, True),
    "fasta manifest": Reader(_prepared(file_of("t.fa", FASTA), _fasta), _open_prepared, _MANIFEST),
    "rows txt": Reader(file_of("t.txt", b"1 2 3\n" * 9), _rows, BYTES),
    "rows jsonl": Reader(file_of("t.jsonl", _JSONL), _rows, mutate.either(BYTES, LINES)),
    "rows csv": Reader(file_of("t.csv", EVENTS), _rows, BYTES),
    "rows npy": Reader(file_of("t.npy", mutate.npy((9, 4))), _rows, mutate.either(BYTES, mutate.npy_header)),
    "rows fasta": Reader(file_of("t.fa", FASTA), _rows, BYTES),
    "rows parquet": Reader(_PARQUET_EVENTS, _rows, BYTES, True),
    "rows ts": Reader(file_of("t.ts", TS), _series_rows, BYTES),
    "rows npz": Reader(file_of("t.npz", _npz()), _series_rows, mutate.either(BYTES, npz_member)),
}
