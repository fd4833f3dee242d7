"""The index beside the shards: believed while it holds, never when the contents changed, and never needed."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from protomamba.data import TokenStream, in_memory, index, open_token_file
from protomamba.errors import UserError
from protomamba.storage import NotCommittedError, atomic_file


def backdate(path: Path, seconds: int = 60) -> None:
    """As if the file had been written some time ago, so that its index entry is believed."""
    status = path.stat()
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns - seconds * 10**9))


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were parsed, in order."""
    parsed: list[Path] = []
    parse = index.parse_text_file
    monkeypatch.setattr(index, "parse_text_file", lambda path: parsed.append(path) or parse(path))
    return parsed


def tokens_of(path: Path, cache_dir: Path | None = None) -> list[int]:
    shards = open_token_file(path, cache_dir)
    return shards.read(0, 0, shards.tokens).tolist()


def test_text_is_parsed_once(tmp_path: Path, counted: list[Path]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("1 2 3")
    for _ in range(3):
        assert tokens_of(path) == [1, 2, 3]
    os.utime(path)  # touched, not changed: the checksum decides
    assert tokens_of(path) == [1, 2, 3]
    assert len(counted) == 1


def test_changed_text_of_the_same_length_is_parsed_again(tmp_path: Path, counted: list[Path]) -> None:
    path = tmp_path / "a.txt"
    for text, tokens in (("1 2 3", [1, 2, 3]), ("4 5 6", [4, 5, 6]), ("4 5 67", [4, 5, 67])):
        path.write_text(text)
        os.utime(path, ns=(0, 10**18))  # size and modification time do not tell
        assert tokens_of(path) == tokens
    assert len(counted) == 3


@pytest.mark.parametrize("can_write", [True, False])
def test_text_that_grows_while_it_is_parsed_is_refused(
    tmp_path: Path, can_write: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text("1 2 3")
    if not can_write:
        (tmp_path / ".protomamba").write_text("")
    parse = index.parse_text_file
    monkeypatch.setattr(index, "parse_text_file", lambda path: [*parse(path), path.write_text("1 2 3 4")][:-1])
    with pytest.raises(UserError, match=r"a.txt: changed while it was read"):
        open_token_file(path)


@pytest.mark.parametrize("damage", ["flip", "cut", "gone", "entry"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, damage: str, counted: list[Path]) -> None:
    path = tmp_path / "a.txt"
    path.write_text("1 2 3")
    backdate(path)
    tokens_of(path)
    cache = tmp_path / ".protomamba" / "a.txt.tokens"
    data = bytearray(cache.read_bytes())
    match damage:
        case "flip":
            data[-1] ^= 1
            cache.write_bytes(data)
        case "cut":
            cache.write_bytes(data[:-4])
        case "gone":
            cache.unlink()
        case _:
            (tmp_path / ".protomamba" / "a.txt.json").write_text("{")
    assert tokens_of(path) == [1, 2, 3]
    assert len(counted) == 2


def test_where_nothing_can_be_written_the_other_folder_or_memory_is_used(tmp_path: Path, counted: list[Path]) -> None:
    place = tmp_path / "data"
    place.mkdir()
    (place / ".protomamba").write_text("a file where the folder should be")
    path = place / "a.txt"
    path.write_text("1 2 300000")
    for _ in range(2):
        assert tokens_of(path, tmp_path / "cache") == [1, 2, 300000]
    assert len(counted) == 1
    shards = open_token_file(path)
    assert shards.read(0, 1, 3).tolist() == [2, 300000]
    assert "kept in memory and will be parsed again next time" in shards.notes[0]
    (place / "b.bin").write_bytes(bytes(range(20)))
    assert "no index could be saved" in open_token_file(place / "b.bin").notes[0]


def stream_over(path: Path) -> TokenStream:
    return TokenStream(open_token_file(path), batch_size=1, seq_len=4, seed=0)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda path: path.write_bytes(path.read_bytes()[:20]), "changed while in use: expected 200 bytes"),
        (lambda path: path.write_bytes(bytes(200)), "changed while in use"),
        (lambda path: path.unlink(), "can no longer be read: No such file"),
    ],
)
def test_a_file_that_shrinks_changes_or_disappears_during_training(tmp_path: Path, change, expected: str) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(200)))
    backdate(path)
    stream = stream_over(path)
    stream.batch(0)
    change(path)
    with pytest.raises(UserError, match=expected) as caught:
        stream.batch(1)
    assert str(path) in str(caught.value)


def test_touching_a_file_during_training_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(200)))
    stream = stream_over(path)
    before = stream.batch(3).tokens_BL
    backdate(path)
    assert (stream.batch(3).tokens_BL == before).all()


def test_no_file_is_held_open(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(bytes(range(200)))
    stream = stream_over(path)
    before = len(os.listdir("/proc/self/fd"))
    for number in range(100):
        stream.batch(number)
    assert len(os.listdir("/proc/self/fd")) == before


def test_atomic_file_leaves_the_old_contents_when_it_fails(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"old")
    with pytest.raises(RuntimeError), atomic_file(path) as file:
        file.write(b"new")
        raise RuntimeError
    full = r"a: not saved \(No space left on device\): .* bytes free in "
    with pytest.raises(NotCommittedError, match=full), atomic_file(path):
        raise OSError(28, os.strerror(28))
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a"]


def test_equal_contents_are_the_same_data_wherever_they_stand(tmp_path: Path) -> None:
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("1 2 3")
    first, second = (open_token_file(tmp_path / folder / "a.txt") for folder in ("x", "y"))
    assert first.identity() == second.identity()
    assert first.fingerprint() != in_memory([1, 2, 3]).fingerprint()
