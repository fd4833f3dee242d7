"""What is known of each token file, kept beside it so that the next start does not read everything again.

`<folder>/.protomamba/<name>.json` holds size, times, checksum, layout and largest token; for a text file
`<name>.tokens` holds its tokens in protomamba's layout. An entry is believed while size and times are as recorded; if
only the times differ the checksum decides. Entries are one file each, written atomically: two runs that index the same
folder do not disturb each other. Nothing here is needed for correctness; all of it may be deleted at any time.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from protomamba.data.files import (
    FileRef,
    check_kinds,
    check_regular_file,
    read_json,
    reference,
    sha256_of,
)
from protomamba.data.formats import HEADER_BYTES, Layout, TokenWriter, check_token_count, read_layout, scan
from protomamba.data.text import parse_text_file
from protomamba.errors import MALFORMED, UserError
from protomamba.storage import SaveError, atomic_file, make_folder, write_json

CACHE_FOLDER = ".protomamba"
ENTRY_VERSION = 1
# A file changed again within the granularity of its clock keeps its time: such a fresh entry is checked by contents.
RACY_NS = 2_000_000_000


@dataclass(frozen=True)
class Indexed:
    """One token file, examined. Tokens are read from `store` (the file, or its converted text) or stand in `data`."""

    source: FileRef
    store: FileRef
    layout: Layout
    max_token: int
    examined_ns: int
    data: npt.NDArray[Any] | None = None
    note: str = ""


def examine(path: Path, cache_dir: Path | None = None) -> Indexed:
    """Layout, checksum and largest token of a file, from its index entry if that still holds, else by reading it.

    `cache_dir` is used where the file's own folder cannot be written. UserError on every defect of the file.
    """
    status = check_regular_file(path)
    if status.st_size == 0:
        raise UserError(f"{path}: the file is empty; expected at least 2 tokens")
    folders = _cache_folders(path, cache_dir)
    for folder in folders:
        known = _load(folder, path)
        fresh = known and _revalidate(known)
        if fresh:
            return fresh if fresh == known else _save(folders, fresh)
    return _convert(path, folders) if path.suffix == ".txt" else _save(folders, _scan(path))


def _cache_folders(path: Path, cache_dir: Path | None) -> list[Path]:
    beside = [path.parent / CACHE_FOLDER]
    if cache_dir is None:
        return beside
    # One given folder may serve files of the same name from several places.
    place = hashlib.sha256(str(path.parent.resolve()).encode()).hexdigest()[:12]
    return [*beside, cache_dir / place]


def _scan(path: Path) -> Indexed:
    examined_ns = time.time_ns()
    result = scan(path)
    return Indexed(result.file, result.file, result.layout, result.max_token, examined_ns)


def _convert(path: Path, folders: list[Path]) -> Indexed:
    """Parse a text file into the first folder that can be written, or into memory, which is said in the note."""
    examined_ns = time.time_ns()
    source = reference(path)
    reason = ""
    for folder in folders:
        store = folder / f"{path.name}.tokens"
        try:
            make_folder(folder)
            with atomic_file(store) as file:
                writer = TokenWriter(file, "<u4")
                for tokens in parse_text_file(path):
                    writer.write(tokens)
                writer.finish()
                check_token_count(path, writer.tokens)
        except SaveError as error:
            reason = str(error)
            continue
        _check_unchanged(source)
        layout = _converted(writer.tokens)
        return _save([folder], Indexed(source, reference(store), layout, writer.max_token, examined_ns))
    return _convert_in_memory(source, examined_ns, reason)


def _converted(tokens: int) -> Layout:
    """Where the tokens of a text file stand once they are parsed."""
    return Layout("txt", "<u4", HEADER_BYTES, tokens)


def _convert_in_memory(source: FileRef, examined_ns: int, reason: str) -> Indexed:
    data = np.concatenate(list(parse_text_file(source.path)))
    check_token_count(source.path, data.size)
    _check_unchanged(source)
    max_token = int(data.max())
    data = data.astype(np.uint16) if max_token < 2**16 else data
    layout = Layout("txt", data.dtype.str, 0, data.size)
    note = f"{source.path.name}: its tokens are kept in memory and will be parsed again next time ({reason})"
    return Indexed(source, source, layout, max_token, examined_ns, data, note)


def _check_unchanged(source: FileRef) -> None:
    if not source.same_stamp(check_regular_file(source.path)):
        raise UserError(f"{source.path}: changed while it was read; start again when it is complete")


def _save(folders: list[Path], indexed: Indexed) -> Indexed:
    """Write the entry where it can be written; where it cannot, the note says what that costs."""
    reason = ""
    for folder in folders:
        try:
            make_folder(folder)
            write_json(folder / f"{indexed.source.path.name}.json", dict(_to_entry(indexed)), sort_keys=True)
            return indexed
        except SaveError as error:
            reason = str(error)
    note = f"{indexed.source.path.name}: no index could be saved, so it is read in full at each start ({reason})"
    return replace(indexed, note=note)


def _to_entry(indexed: Indexed) -> Iterator[tuple[str, Any]]:
    yield "version", ENTRY_VERSION
    yield "examined_ns", indexed.examined_ns
    yield "max_token", indexed.max_token
    yield "layout", vars(indexed.layout)
    for name, file in (("source", indexed.source), ("store", indexed.store)):
        yield name, {key: value for key, value in vars(file).items() if key != "path"}


def _load(folder: Path, path: Path) -> Indexed | None:
    """The entry of `path`, or None if there is none that can be used: it is only a cache, and is then made again."""
    entry_path = folder / f"{path.name}.json"
    if not entry_path.is_file():
        return None
    try:
        entry = read_json(entry_path)
        if entry["version"] != ENTRY_VERSION:
            return None
        layout = Layout(**entry["layout"])
        store = folder / f"{path.name}.tokens" if layout.kind == "txt" else path
        files = (FileRef(path, **entry["source"]), FileRef(store, **entry["store"]))
        for each in (layout, *files):
            check_kinds(each)
        if layout.kind == "txt" and layout != _converted((files[1].size - HEADER_BYTES) // 4):
            return None
        return Indexed(*files, layout, int(entry["max_token"]), int(entry["examined_ns"]))
    except (UserError, *MALFORMED):
        return None


def _revalidate(known: Indexed) -> Indexed | None:
    """`known` if the files are still those, with new times if only these changed; None if contents differ."""
    now = time.time_ns()
    source = _current(known.source, known.examined_ns)
    if source is not None and known.layout.kind != "txt" and read_layout(known.source.path) != known.layout:
        return None  # a sidecar now says another width
    store = source if known.store.path == known.source.path else _current(known.store, known.examined_ns)
    if source is None or store is None:
        return None
    if source is known.source and (store is known.store or store is source):
        return known
    return replace(known, source=source, store=store, examined_ns=now)


def _current(file: FileRef, examined_ns: int) -> FileRef | None:
    try:
        status = check_regular_file(file.path)
        if status.st_size != file.size:
            return None
        if file.same_stamp(status) and max(file.mtime_ns, file.ctime_ns) + RACY_NS < examined_ns:
            return file
        if sha256_of(file.path) != file.sha256:
            return None
    except UserError:
        return None
    return FileRef.of(file.path, status, file.sha256)
