"""Token files: every layout reads back, and every defect is one line that names the file and the place."""

from __future__ import annotations

import json
import struct
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from protomamba.data import in_memory, infer_vocab, open_token_dir, open_token_file
from protomamba.data.arrays import read_npy_header
from protomamba.data.formats import TokenWriter
from protomamba.data.shards import ShardSet
from protomamba.data.text import parse_text_file
from protomamba.errors import ConfigError, UserError
from protomamba.storage import atomic_file

TOKENS = [3, 0, 70, 12, 5, 65535, 9]


def write_own(path: Path, tokens: list[int], dtype: str = "<u2") -> None:
    with atomic_file(path) as file:
        writer = TokenWriter(file, dtype)
        writer.write(np.array(tokens))
        writer.finish()


def write_llmc(path: Path, tokens: list[int], magic: int = 20240520, version: int = 1, dtype: str = "<u2") -> None:
    header = struct.pack("<256i", magic, version, len(tokens), *[0] * 253)
    path.write_bytes(header + np.array(tokens, dtype=dtype).tobytes())


def read_all(shards: ShardSet) -> list[int]:
    return [int(t) for i, shard in enumerate(shards.shards) for t in shards.read(i, 0, shard.tokens)]


def error_of(path: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_token_file(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    "kind", ["txt", "own-u2", "own-u4", "llmc-gpt2", "llmc-llama3", "nanogpt", "u4-sidecar", "npy-u2", "npy->i8"]
)
def test_every_layout_reads_back_and_again_from_the_index(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a." + {"t": "txt", "n": "npy" if kind.startswith("npy") else "bin"}.get(kind[0], "bin"))
    match kind:
        case "txt":
            path.write_text(" 3 0\n70\t12\r\n5 65535 0009\n")
        case "own-u2" | "own-u4":
            write_own(path, TOKENS, "<" + kind[-2:])
        case "llmc-gpt2":
            write_llmc(path, TOKENS)
        case "llmc-llama3":
            write_llmc(path, TOKENS, 20240801, 7, "<u4")
        case "nanogpt":
            path.write_bytes(np.array(TOKENS, dtype="<u2").tobytes())
        case "u4-sidecar":
            path.write_bytes(np.array(TOKENS, dtype="<u4").tobytes())
            path.with_name("a.bin.json").write_text('{"dtype": "uint32"}')
        case _:
            np.save(path, np.array(TOKENS, dtype=kind[4:] if ">" in kind else "<u2"))
    for _ in range(2):
        shards = open_token_file(path)
        assert read_all(shards) == TOKENS
        assert shards.vocab_size == 65536
        assert shards.read(0, 2, 4).dtype == np.int64


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"1 2\n3 word 4", "line 2, column 3: expected an integer token, found the word 'word'"),
        (b"1 2\n\n3 4.5", "line 3, column 3: expected an integer token, found the number '4.5'"),
        (b"1 -2 3", "line 1, column 3: expected an integer token, found the negative number '-2'"),
        (b"1 \xff\xfe 3", "line 1, column 3: expected an integer token, found the byte 0xff, which is not UTF-8"),
        ("1 é".encode(), "found the word 'é'"),
        (b"1 2x 3", "found the word '2x'"),
        (b"1 4294967296", "found '4294967296', beyond 4294967295"),
        (b"1 99999999999999", "found '99999999999999', beyond"),
        (b"1 " + b"7" * 5000 + b" 2", "column 3: expected an integer token, found '7777"),
        (b"", "the file is empty"),
        (b" \n\n ", "holds no token"),
        (b"17", "holds one token"),
    ],
)
def test_bad_text_is_refused_with_line_and_column(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    assert expected in error_of(path)
    assert not list(tmp_path.rglob("*.tmp")), "the half-written cache is removed"


def test_a_bad_word_far_into_a_file_is_located(tmp_path: Path) -> None:
    path = tmp_path / "bad.txt"
    path.write_text("12 345\n" * 300_000 + "1 oops\n")
    assert "line 300001, column 3" in error_of(path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tokens=st.lists(st.integers(0, 2**32 - 1), max_size=60),
    gaps=st.lists(st.sampled_from([" ", "\n", "\t", "  ", "\r\n", "\v \f"]), min_size=62, max_size=62),
    block=st.integers(1, 40),
)
def test_text_parses_the_same_in_blocks_of_any_size(
    tmp_path: Path, tokens: list[int], gaps: list[str], block: int
) -> None:
    path = tmp_path / "t.txt"
    path.write_bytes("".join(gap + str(token) for gap, token in zip(gaps, tokens, strict=False)).encode() + b" ")
    found = [int(token) for part in parse_text_file(path, block) for token in part]
    assert found == tokens


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("odd.bin", b"\1\0\2\0\3", "5 bytes is not a whole number of 2-byte tokens"),
        ("empty.bin", b"", "the file is empty"),
        ("one.bin", b"\1\0", "holds one token"),
        ("short.bin", b"PMTOKENS" + b"\0" * 20, "cut short: found 28 bytes of a 256-byte header"),
        ("new.bin", struct.pack("<8sIIQ", b"PMTOKENS", 9, 2, 2) + bytes(236), "unknown header (version 9"),
        ("width.bin", struct.pack("<8sIIQ", b"PMTOKENS", 1, 3, 2) + bytes(236), "3 bytes a token"),
        ("eval.bin", struct.pack("<256i", 20240522, 1, *[0] * 254), "found an llm.c evaluation file"),
        ("llmc.bin", struct.pack("<256i", 20240520, 3, 5, *[0] * 253), "llm.c header with version 3"),
        ("not.npy", b"no numpy here", "not a readable .npy file"),
        ("empty.npy", b"", "the file is empty"),
        ("tokens.csv", b"1,2", "expected a token file ending in .bin, .npy, .txt"),
    ],
)
def test_bad_binary_files_are_refused(tmp_path: Path, name: str, content: bytes, expected: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    assert expected in error_of(path)


def test_a_file_cut_short_or_too_long_says_what_was_promised(tmp_path: Path) -> None:
    for path, write in ((tmp_path / "a.bin", write_own), (tmp_path / "b.bin", write_llmc)):
        write(path, TOKENS)
        whole = path.read_bytes()
        path.write_bytes(whole[:-3])
        assert "cut short: its header promises 7 tokens of 2 bytes" in error_of(path)
        path.write_bytes(whole + b"\0\0")
        assert "longer than it says" in error_of(path)
    path = tmp_path / "c.npy"
    np.save(path, np.arange(100))
    path.write_bytes(path.read_bytes()[:-10])
    assert "cut short: its header promises 100 tokens" in error_of(path)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([1.0, 2.0]), "found 1 dimension of float64"),
        (np.ones((2, 3), dtype=int), "found 2 dimensions of int64"),
        (np.array([4, 5, -1, 6]), "token 2: expected a token >= 0, found -1"),
        (np.array([4, 2**40]), f"token 1: expected at most 4294967295, found {2**40}"),
        (np.array([True, False]), "of bool"),
    ],
)
def test_npy_of_the_wrong_kind_is_refused(tmp_path: Path, array: np.ndarray, expected: str) -> None:
    path = tmp_path / "a.npy"
    np.save(path, array)
    assert expected in error_of(path)


def test_npy_with_objects_is_refused_without_unpickling(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return pytest.fail, ("a pickle was read",)

    np.save(tmp_path / "a.npy", np.array([Bomb(), Bomb()], dtype=object), allow_pickle=True)
    assert "of object" in error_of(tmp_path / "a.npy")


def test_headerless_uint32_is_not_read_as_uint16(tmp_path: Path) -> None:
    path = tmp_path / "a.bin"
    path.write_bytes(np.arange(1000, 1100, dtype="<u4").tobytes())
    assert "looks like uint32" in error_of(path)
    sidecar = tmp_path / "a.bin.json"
    sidecar.write_text('{"dtype": "uint32"}')
    assert read_all(open_token_file(path)) == list(range(1000, 1100))
    sidecar.write_text('{"dtype": "uint16"}')
    assert open_token_file(path).tokens == 200, "the index does not outlive a changed sidecar"
    sidecar.write_text('{"dtype": "int7"}')
    with pytest.raises(UserError, match=r'a.bin.json, key "dtype": expected "uint16" or "uint32", found \'int7\''):
        open_token_file(path)


def test_a_sidecar_that_contradicts_the_header_is_refused(tmp_path: Path) -> None:
    write_own(tmp_path / "a.bin", TOKENS)
    (tmp_path / "a.bin.json").write_text('{"dtype": "uint32"}')
    assert "its header says <u2, a.bin.json says <u4" in error_of(tmp_path / "a.bin")


def test_missing_files_and_folders_in_place_of_files(tmp_path: Path) -> None:
    assert "cannot be read: No such file" in error_of(tmp_path / "none.bin")
    assert "found a folder; use --token-dir" in error_of(tmp_path)
    with pytest.raises(UserError, match="expected a folder of shards: No such file"):
        open_token_dir(tmp_path / "none")
    (tmp_path / "a.txt").write_text("1 2 3")
    with pytest.raises(UserError, match="expected a folder of shards: Not a directory"):
        open_token_dir(tmp_path / "a.txt")


def test_a_folder_holds_shards_of_one_kind(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found no token files"):
        open_token_dir(tmp_path)
    (tmp_path / "b.txt").write_text("1 2 3")
    (tmp_path / "a.txt").write_text("4 5")
    (tmp_path / "notes.md").write_text("not tokens")
    shards = open_token_dir(tmp_path)
    assert [shard.name for shard in shards.shards] == ["a.txt", "b.txt"]
    assert read_all(shards) == [4, 5, 1, 2, 3]
    with pytest.raises(UserError, match=r"expected .bin shards, found 2 .txt"):
        open_token_dir(tmp_path, "bin")
    with pytest.raises(ConfigError, match="--shard-ext md: expected one of bin, npy, txt"):
        open_token_dir(tmp_path, "md")
    write_own(tmp_path / "c.bin", TOKENS)
    with pytest.raises(UserError, match=r"expected shards of one kind .*, found 1 .bin, 2 .txt; use --shard-ext"):
        open_token_dir(tmp_path)
    write_llmc(tmp_path / "d.bin", TOKENS)
    with pytest.raises(UserError, match="mixed layouts"):
        open_token_dir(tmp_path, ".bin")


def test_an_empty_shard_in_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("4 5")
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match=r"b.txt: the file is empty"):
        open_token_dir(tmp_path)


@pytest.mark.parametrize("name", ["a.txt", "a.bin", "a.npy"])
def test_a_token_outside_the_vocabulary_is_located(tmp_path: Path, name: str) -> None:
    tokens = [1] * 5000 + [900, 1, 950]
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("\n".join(map(str, tokens)))
    elif name == "a.bin":
        path.write_bytes(np.array(tokens, dtype="<u2").tobytes())
    else:
        np.save(path, np.array(tokens))
    shards = open_token_file(path)
    shards.check_vocab(951)
    with pytest.raises(
        UserError, match=rf"{name}, token 5,000: expected a token below the vocabulary size 900, found 900"
    ):
        shards.check_vocab(900)
    assert infer_vocab(shards, in_memory([1, 2000])) == 2001


def test_tokens_in_memory_are_checked_and_kept() -> None:
    array = np.array([1, 2, 3])
    shards = in_memory(array)
    array[0] = 9
    assert read_all(shards) == [1, 2, 3]
    for bad, message in (([1], "at least 2"), ([1, -2], "token 1: expected a token >= 0"), ([1.5, 2], "float64")):
        with pytest.raises(UserError, match=message):
            in_memory(bad)
    with pytest.raises(UserError, match="token 1: expected a token below the vocabulary size 3, found 3"):
        in_memory([0, 3]).check_vocab(3)


def test_split_holds_out_the_tail_of_the_whole_set(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(" ".join(map(str, range(60))))
    (tmp_path / "b.txt").write_text(" ".join(map(str, range(60, 100))))
    shards = open_token_dir(tmp_path)
    for ratio, held_out in ((0.05, 5), (0.4, 40), (0.7, 70)):
        train, validation = shards.split(ratio)
        assert read_all(train) == list(range(100 - held_out))
        assert read_all(validation) == list(range(100 - held_out, 100))
    with pytest.raises(ConfigError, match="--val-ratio 1"):
        shards.split(1.0)
    with pytest.raises(UserError, match="too few to hold out"):
        in_memory([1, 2]).split(0.01)


def test_reading_outside_a_part_is_an_error() -> None:
    train, _ = in_memory(range(10)).split(0.5)
    with pytest.raises(IndexError):
        train.read(0, 3, 6)


def test_a_manifest_pins_the_shards(tmp_path: Path) -> None:
    from protomamba.data.files import reference
    from protomamba.data.manifest import Manifest, ShardEntry

    entries = []
    for name in ("a.bin", "b.bin"):
        write_own(tmp_path / name, TOKENS)
        file = reference(tmp_path / name)
        entries.append(ShardEntry(name, 7, file.size, 65535, file.sha256))
    Manifest(tmp_path, "uint16", 70_000, 0, {"kind": "bytes"}, {}, entries).write()
    assert open_token_dir(tmp_path).vocab_size == 70_000, "the declared vocabulary, not the largest token"
    (tmp_path / "c.bin").write_bytes((tmp_path / "a.bin").read_bytes())
    with pytest.raises(UserError, match=r"shard c.bin is not listed"):
        open_token_dir(tmp_path)
    (tmp_path / "c.bin").unlink()
    original = (tmp_path / "b.bin").read_bytes()
    for bit in np.random.default_rng(0).choice(len(original) * 8, 200, replace=False):
        damaged = bytearray(original)
        damaged[bit // 8] ^= 1 << (bit % 8)
        (tmp_path / "b.bin").write_bytes(damaged)
        with pytest.raises(UserError, match=r"b\.bin"):
            open_token_dir(tmp_path)
    (tmp_path / "b.bin").unlink()
    with pytest.raises(UserError, match=r"shard b.bin is listed but missing"):
        open_token_dir(tmp_path)
    body = json.loads((tmp_path / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**body, "version": 2}))
    with pytest.raises(UserError, match="version 2; this protomamba reads version 1"):
        open_token_dir(tmp_path)


def test_headers_are_parsed_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Until 3.11.4 Python's parser counts its depth for all threads together: a run over several shards ended with
    "SystemError: AST constructor recursion depth mismatch" now and then."""
    paths = [tmp_path / f"{number}.npy" for number in range(8)]
    for path in paths:
        np.save(path, np.arange(40, dtype=np.uint16))
    read, alone, at_once = np.lib.format.read_array_header_1_0, threading.Lock(), []

    def watched(*arguments: Any) -> Any:
        at_once.append(not alone.acquire(blocking=False))
        time.sleep(0.01)
        if not at_once[-1]:
            alone.release()
        return read(*arguments)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", watched)

    def header(path: Path) -> Any:
        with path.open("rb") as file:
            return read_npy_header(path, file)[0]

    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(header, paths)) == {(40,)}
    assert len(at_once) == 8 and not any(at_once)
