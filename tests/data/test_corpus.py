"""The default corpus: every source file whole and in a fixed order, built once, checked on each use."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from protomamba.data import ShardSet, corpus, default_corpus
from protomamba.errors import UserError

ORDER = ["b.py", "pkg/c.py", "pkg/__init__.py", "a.py"]


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small library in place of Python's own."""
    root = tmp_path / "lib"
    files = {
        "a.py": b"import b\n",
        "b.py": "é = 1\n".encode(),
        "pkg/__init__.py": b"",
        "pkg/c.py": b"c\n",
        "pkg/notes.txt": b"no source",
        "test/test_a.py": b"left out",
        "pkg/tests/d.py": b"left out",
        "site-packages/e.py": b"left out",
        "_sysconfigdata_x.py": b"left out",
    }
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(root))
    return root


def test_files_are_whole_and_each_ends_with_256(tmp_path: Path, library: Path) -> None:
    shards = default_corpus(tmp_path / "run" / "corpus")
    tokens = shards.read(0, 0, shards.tokens)
    documents = np.split(tokens, np.flatnonzero(tokens == 256) + 1)
    assert documents.pop().size == 0
    found = [bytes(document[:-1].tolist()) for document in documents]
    assert sorted(found) == sorted([b"import b\n", "é = 1\n".encode(), b"", b"c\n"])
    # Pinned: another order would be other data, and figures of one version could not be compared with the next one's.
    assert [path.as_posix() for path in corpus.stdlib_sources()] == ORDER
    assert found == [(library / path).read_bytes() for path in corpus.stdlib_sources()]
    assert shards.vocab_size == 257
    assert shards.manifest is not None
    assert shards.manifest.eos_token == 256
    assert shards.manifest.source["files"] == 4


def test_it_is_built_once_and_kept_when_the_library_changes(tmp_path: Path, library: Path) -> None:
    folder = tmp_path / "corpus"
    before = default_corpus(folder)
    (library / "new.py").write_text("x")
    assert default_corpus(folder).identity() == before.identity()
    assert default_corpus(tmp_path / "other").identity() != before.identity()


def test_a_damaged_or_unfinished_corpus_is_noticed(tmp_path: Path, library: Path) -> None:
    folder = tmp_path / "corpus"
    before = default_corpus(folder)
    shard = folder / corpus.SHARD
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(UserError, match=r"stdlib.bin: damaged or replaced"):
        default_corpus(folder)
    (folder / "manifest.json").unlink()  # killed before the last step: built again
    assert default_corpus(folder).identity() == before.identity()


def test_a_python_without_sources_is_an_error(tmp_path: Path, library: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(UserError, match="has no sources of its standard library; give tokens with --token-file"):
        default_corpus(tmp_path / "corpus")


def test_the_held_out_tail_of_the_real_corpus_is_like_the_rest(tmp_path: Path) -> None:
    def share_of_spaces(part: ShardSet) -> float:
        return float((part.read(0, 0, part.tokens) == ord(" ")).mean())

    shards = default_corpus(tmp_path)
    assert shards.tokens > 2_000_000
    train, validation = shards.split(0.05)
    assert abs(share_of_spaces(train) - share_of_spaces(validation)) < 0.05
