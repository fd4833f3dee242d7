"""The default corpus: the sources of the running Python's standard library, as bytes; 256 ends each file.

It is real text and on every machine that can run the program. Tests are left out, since many distributions do not ship
them, and so are files made by the build of Python (`_sysconfigdata*`; the help texts in `pydoc_data`: 0.75 MB in a
single file, which would be all of a held-out part it fell into). The order is by checksum of the file's name, fixed and
without pattern, so that the tail held out for validation is a sample of the whole, not the packages from x to z.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sysconfig
from pathlib import Path

import numpy as np

from protomamba.data.files import reference
from protomamba.data.formats import TokenWriter
from protomamba.data.manifest import MANIFEST, Manifest, ShardEntry
from protomamba.data.shards import ShardSet, open_token_file
from protomamba.data.tokenizer import BYTES_EOS, ByteTokenizer
from protomamba.errors import UserError
from protomamba.storage import atomic_file, make_folder

SHARD = "stdlib.bin"
LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test", "pydoc_data"}


def default_corpus(folder: str | Path) -> ShardSet:
    """The corpus in `folder`, built there on the first call and checked on every later one.

    About 11 million tokens, vocabulary 257. A corpus that is there and sound is used whatever Python made it, so that a
    run can be resumed under another version; a damaged one is an error. UserError if Python came without sources.
    """
    folder = Path(folder)
    if not (folder / MANIFEST).is_file():
        _build(folder)
    return open_token_file(folder / SHARD)


def stdlib_sources(root: Path | None = None) -> list[Path]:
    """The sources under `root` (default: the running Python's library), relative to it, in the corpus's order."""
    root = root or Path(sysconfig.get_path("stdlib"))
    found = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if name not in LEFT_OUT_FOLDERS]
        here = Path(folder).relative_to(root)
        found += [here / name for name in names if name.endswith(".py") and not name.startswith("_sysconfigdata")]
    return sorted(found, key=lambda path: hashlib.sha256(path.as_posix().encode()).digest())


def _build(folder: Path) -> None:
    root = Path(sysconfig.get_path("stdlib"))
    sources = stdlib_sources(root)
    if not sources:
        raise UserError(f"{root}: this Python has no sources of its standard library; give tokens with --token-file")
    make_folder(folder)
    with atomic_file(folder / SHARD) as file:
        writer = TokenWriter(file, "<u2")
        for source in sources:
            # A list of the bytes and the mark that ends a file; uint16 because 256 does not fit a byte.
            tokens = np.frombuffer((root / source).read_bytes(), dtype=np.uint8).astype(np.uint16)
            writer.write(np.append(tokens, np.uint16(BYTES_EOS)))
        writer.finish()
    written = reference(folder / SHARD)
    tokenizer = ByteTokenizer()
    Manifest(
        folder,
        "uint16",
        tokenizer.vocab_size,
        tokenizer.eos_token,
        {"kind": tokenizer.kind, "identity": tokenizer.identity},
        {"what": "Python standard library", "python": platform.python_version(), "files": len(sources)},
        [ShardEntry(SHARD, writer.tokens, written.size, writer.max_token, written.sha256)],
        preset="bytes",
        raw_bytes=writer.tokens - len(sources),
    ).write()
