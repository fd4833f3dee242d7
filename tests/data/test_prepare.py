"""Preparing: the same bytes for any number of jobs and after any stop, and the text comes back out."""

from __future__ import annotations

import gzip
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data import documents, load_tokenizer, open_token_dir, tokenizer_from_json
from protomamba.data import prepare as preparing
from protomamba.data.documents import Source, pieces_of
from protomamba.data.manifest import Manifest
from protomamba.data.prepare import prepare
from protomamba.errors import ConfigError, UserError

EOS = 256


@pytest.fixture(autouse=True)
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks and units of a few bytes, so that short inputs have many of each."""
    monkeypatch.setattr(documents.chunks_of, "__defaults__", (0, 37))
    monkeypatch.setattr(documents.grouped, "__defaults__", (53,))


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A folder with a file of each kind of name, among them one in a subfolder and a hidden one."""
    folder = tmp_path / "in"
    (folder / "sub").mkdir(parents=True)
    (folder / "a.txt").write_text("The first document,\nwith two lines and an é.\n" * 9)
    (folder / "sub" / "b.md").write_text("no end of line " * 20)
    (folder / "c.jsonl").write_text("".join(json.dumps({"text": f"entry {i} ☃"}) + "\n\n" for i in range(30)))
    (folder / "empty.txt").write_text("")
    (folder / ".hidden").write_text("not read")
    return folder


def expected_documents(folder: Path) -> list[str]:
    entries = [f"entry {i} ☃" for i in range(30)]
    return [(folder / "a.txt").read_text(), *entries, (folder / "sub" / "b.md").read_text()]


def all_tokens(folder: Path) -> list[int]:
    shards = open_token_dir(folder, "bin")
    return [int(t) for i, shard in enumerate(shards.shards) for t in shards.read(i, 0, shard.tokens)]


def split_documents(tokens: list[int], eos: int) -> list[list[int]]:
    parts: list[list[int]] = [[]]
    for token in tokens:
        if token == eos:
            parts.append([])
        else:
            parts[-1].append(token)
    assert parts.pop() == []
    return parts


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_documents_come_back_as_bytes(tmp_path: Path, texts: Path) -> None:
    manifest = prepare([texts], tmp_path / "out", shard_tokens=100)
    found = split_documents(all_tokens(tmp_path / "out"), EOS)
    assert [bytes(tokens).decode() for tokens in found] == expected_documents(texts)
    assert manifest.tokens == len(all_tokens(tmp_path / "out"))
    assert (manifest.vocab_size, manifest.eos_token, manifest.dtype) == (257, 256, "uint16")
    assert manifest.source["documents"] == 32
    assert [each["name"] for each in manifest.source["inputs"]] == ["a.txt", "c.jsonl", "sub/b.md"]
    sizes = [shard.tokens for shard in manifest.shards]
    assert set(sizes[:-1]) == {100}
    assert 10 <= sizes[-1] < 110


@pytest.mark.parametrize("train_bpe", [None, 300])
def test_any_number_of_jobs_writes_the_same_bytes(tmp_path: Path, texts: Path, train_bpe: int | None) -> None:
    folders = []
    for jobs in (1, 2, 5):
        folder = tmp_path / f"jobs-{jobs}"
        prepare([texts], folder, shard_tokens=64, jobs=jobs, train_bpe=train_bpe)
        folders.append(contents(folder))
    assert folders[0] == folders[1] == folders[2]
    assert len(folders[0]) > 5


class Stopped(Exception):
    pass


@pytest.mark.parametrize("train_bpe", [None, 300])
def test_a_stopped_run_goes_on_to_the_same_bytes(
    tmp_path: Path, texts: Path, train_bpe: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = {"shard_tokens": 64, "train_bpe": train_bpe}
    prepare([texts], tmp_path / "whole", **arguments)
    encode = preparing._encode
    for steps in (1, 5, 17, 38):
        folder = tmp_path / f"stopped-{steps}"
        ticks = itertools.count(1)

        def stop_after(read: int, total: int, ticks: Iterator[int] = ticks, limit: int = steps) -> None:
            if next(ticks) % limit == 0:
                raise Stopped

        for _ in range(2):  # stopped twice, the second time further on
            try:
                prepare([texts], folder, progress=stop_after, **arguments)
            except Stopped:
                assert not (folder / "manifest.json").exists()
        prepare([texts], folder, **arguments)
        assert contents(folder) == contents(tmp_path / "whole")
    calls = []
    monkeypatch.setattr(preparing, "_encode", lambda *a: calls.append(1) or encode(*a))
    prepare([texts], folder, **arguments)
    assert not calls, "a finished folder is left as it is"


def test_a_damaged_shard_of_a_stopped_run_is_made_again(tmp_path: Path, texts: Path) -> None:
    prepare([texts], tmp_path / "whole", shard_tokens=64)

    def stop_late(read: int, total: int) -> None:
        if (tmp_path / "out" / "shard-00005.bin").exists():
            raise Stopped

    with pytest.raises(Stopped):
        prepare([texts], tmp_path / "out", shard_tokens=64, progress=stop_late)
    damaged = tmp_path / "out" / "shard-00002.bin"
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"\xff")
    prepare([texts], tmp_path / "out", shard_tokens=64)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_folder_in_other_use_is_refused(tmp_path: Path, texts: Path) -> None:
    out = tmp_path / "out"
    prepare([texts], out, shard_tokens=64)
    for change in ({"shard_tokens": 65}, {"eos": "none", "shard_tokens": 64}):
        with pytest.raises(UserError, match=r"out: holds data made from other inputs or with other options"):
            prepare([texts], out, **change)
    (texts / "a.txt").write_text("changed")
    with pytest.raises(UserError, match="made from other inputs"):
        prepare([texts], out, shard_tokens=64)
    with pytest.raises(UserError, match="lies in --out-dir"):
        prepare([texts], texts / "sub")
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "shard-00000.bin").write_bytes(b"somebody's")
    with pytest.raises(UserError, match="used: holds data"):
        prepare([texts], tmp_path / "used")


def test_a_trained_tokenizer_round_trips_and_is_carried_as_json(tmp_path: Path, texts: Path) -> None:
    manifest = prepare([texts], tmp_path / "out", shard_tokens=64, train_bpe=300)
    tokenizer = load_tokenizer(str(tmp_path / "out" / "tokenizer.json"))
    carried = tokenizer_from_json(tokenizer.to_json())
    assert carried.identity == tokenizer.identity == manifest.tokenizer["identity"]
    assert manifest.vocab_size == tokenizer.vocab_size == 300
    assert manifest.eos_token is not None
    found = split_documents(all_tokens(tmp_path / "out"), manifest.eos_token)
    assert [carried.decode(tokens) for tokens in found] == expected_documents(texts)
    assert carried.decode(carried.encode("naïve ☃\n")) == "naïve ☃\n"
    again = prepare([texts], tmp_path / "again", tokenizer=str(tmp_path / "out" / "tokenizer.json"), shard_tokens=64)
    assert [shard.sha256 for shard in again.shards] == [shard.sha256 for shard in manifest.shards]


def test_bytes_need_not_be_text(tmp_path: Path) -> None:
    path = tmp_path / "genome.dat"
    data = bytes(range(256)) * 5
    path.write_bytes(data)
    prepare([path], tmp_path / "out", format="bytes", eos="none")
    assert bytes(all_tokens(tmp_path / "out")) == data
    with pytest.raises(UserError, match=r"genome.dat, line 2, byte 128: expected UTF-8 text, found 0x80"):
        prepare([path], tmp_path / "text")
    with pytest.raises(ConfigError, match="--format bytes"):
        prepare([path], tmp_path / "bpe", format="bytes", train_bpe=300)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.sampled_from("a\né☃𝄞"), max_size=300))
def test_pieces_are_the_file_and_cut_no_character(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    path = tmp_path_factory.mktemp("pieces") / "a"
    path.write_bytes(text.encode())
    pieces = list(pieces_of(Source(path, "a", "text"), "text"))
    assert "".join(piece.data.decode() for piece in pieces) == text
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].read == len(text.encode())


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("{", "line 2: expected a JSON object"),
        ("[1]", "line 2: expected an object with 'text', found list"),
        ('{"body": "x"}', "found keys body; name the text's key with --field"),
        ('{"text": 3}', "line 2: expected text in 'text', found 3"),
        ('{"text": "\\ud800"}', "half a surrogate pair at 0"),
    ],
)
def test_bad_json_lines_are_located(tmp_path: Path, line: str, expected: str) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "good"}\n' + line + "\n")
    with pytest.raises(UserError) as caught:
        prepare([path], tmp_path / "out")
    assert str(path) in str(caught.value)
    assert expected in str(caught.value)


def test_bad_arguments_and_missing_inputs(tmp_path: Path, texts: Path) -> None:
    (tmp_path / "nothing").mkdir()
    for bad, error, message in (
        ({"inputs": [tmp_path / "none"]}, UserError, "none: cannot be read: No such file"),
        ({"inputs": [tmp_path / "nothing"]}, UserError, "expected files or folders with text, found none"),
        ({"format": "xml"}, ConfigError, "--format xml: expected one of auto, text, bytes, jsonl, parquet"),
        ({"shard_tokens": 1}, ConfigError, "--shard-tokens 1"),
        ({"jobs": 0}, ConfigError, "--threads 0"),
        ({"train_bpe": 100}, ConfigError, "--train-bpe 100: expected at least 257"),
        ({"train_bpe": 300, "tokenizer": str(texts / "a.txt")}, ConfigError, "give one of them"),
        ({"tokenizer": str(tmp_path / "none.json")}, UserError, "none.json: cannot be read"),
        ({"tokenizer": str(texts / "a.txt")}, UserError, "not a readable tokenizers file"),
        ({"eos": "<end>"}, UserError, "--eos <end>: bytes end a document with 256"),
        ({"eos": "<end>", "train_bpe": 300}, UserError, "has no token '<end>'"),
    ):
        with pytest.raises(error, match=message):
            prepare(**{"inputs": [texts], "out_dir": tmp_path / "out", **bad})
        for path in (tmp_path / "out").glob("*"):
            path.unlink()


def test_missing_extras_say_what_to_install(tmp_path: Path, texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"pip install 'protomamba\[tokenizers\]'"):
        prepare([texts], tmp_path / "out", train_bpe=300)
    (texts / "d.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"d.parquet: .*pip install 'protomamba\[parquet\]'"):
        prepare([texts / "d.parquet"], tmp_path / "out2")


def test_parquet_columns_are_documents(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    entries = [f"row {i} ☃" for i in range(700)]
    parquet.write_table(pyarrow.table({"body": entries, "n": list(range(700))}), tmp_path / "a.parquet")
    prepare([tmp_path / "a.parquet"], tmp_path / "out", field="body")
    assert [bytes(tokens).decode() for tokens in split_documents(all_tokens(tmp_path / "out"), EOS)] == entries
    with pytest.raises(UserError, match=r"a.parquet: expected a column 'text', found body, n; name it with --field"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out2")
    with pytest.raises(UserError, match="row 1: expected text in 'n', found 0"):
        prepare([tmp_path / "a.parquet"], tmp_path / "out3", field="n")
    (tmp_path / "b.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(UserError, match=r"b.parquet: not a readable parquet file"):
        prepare([tmp_path / "b.parquet"], tmp_path / "out4", field="body")


def test_progress_goes_from_nothing_to_everything(tmp_path: Path, texts: Path) -> None:
    calls: list[tuple[int, int]] = []
    manifest = prepare([texts], tmp_path / "out", progress=lambda read, total: calls.append((read, total)))
    total = sum(each["bytes"] for each in manifest.source["inputs"])
    assert calls == sorted(calls)
    assert calls[-1] == (total, total)


def test_prepared_folders_are_described_by_their_manifest(tmp_path: Path, texts: Path) -> None:
    manifest: Manifest = prepare([texts], tmp_path / "out", shard_tokens=64)
    shards = open_token_dir(tmp_path / "out", "bin")
    assert shards.manifest == manifest
    assert shards.vocab_size == 257, "declared, although no text holds all bytes"
    assert np.array_equal([shard.tokens for shard in shards.shards], [shard.tokens for shard in manifest.shards])


def test_damaged_tokenizer_descriptions_are_refused() -> None:
    for text in ("{", "[]", '{"kind": "bytes"}', '{"kind": "other"}', '{"kind": "bytes", "eos": 7}'):
        with pytest.raises(UserError):
            tokenizer_from_json(text)
    assert tokenizer_from_json(load_tokenizer("bytes", "none").to_json()).eos_token is None


def test_a_call_that_failed_before_its_first_shard_is_in_nobodys_way(texts: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="--eos foo"):
        prepare([texts], out, eos="foo")
    assert prepare([texts], out).tokens > 0


@pytest.mark.parametrize("name", ["x.csv", "x.TSV", "x.csv.gz", "x.fa", "x.fasta.gz", "x.ts", "x.npz"])
def test_a_table_or_sequences_are_not_silently_text(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(gzip.compress(b"a,b\n") if name.endswith(".gz") else b"a,b\n1,2\n")
    kind = "fasta" if ".fa" in name else "labels" if name in ("x.ts", "x.npz") else "events"
    with pytest.raises(ConfigError, match=rf"`protomamba prepare {kind} .*or --format text"):
        prepare([tmp_path / name], tmp_path / "out")
    if not name.endswith(".gz"):
        assert prepare([tmp_path / name], tmp_path / "out", format="text").tokens == 9
        (tmp_path / "in").mkdir()
        (tmp_path / "in" / name).write_bytes(b"a,b\n1,2\n")
        assert prepare([tmp_path / "in"], tmp_path / "out2").tokens == 9, "a folder may hold anything"


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_compressed_text_gives_the_tokens_of_the_text(suffix: str, tmp_path: Path) -> None:
    text = "".join(f"line {i} äöü\n" for i in range(200_000)).encode()
    rows = b"".join(json.dumps({"text": f"document {i}"}).encode() + b"\n" for i in range(3_000))
    for name, data in (("a.txt", text), ("b.jsonl", rows)):
        (tmp_path / name).write_bytes(data)
        compress(tmp_path / f"{name}{suffix}", data)
        plain = prepare([tmp_path / name], tmp_path / f"{name}-plain")
        packed = prepare([tmp_path / f"{name}{suffix}"], tmp_path / f"{name}-packed")
        assert [shard.sha256 for shard in packed.shards] == [shard.sha256 for shard in plain.shards]
        assert packed.raw_bytes == plain.raw_bytes
    whole = (tmp_path / f"a.txt{suffix}").read_bytes()
    (tmp_path / f"cut.txt{suffix}").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=rf"cut\.txt\{suffix}: broken"):
        prepare([tmp_path / f"cut.txt{suffix}"], tmp_path / "cut")


def compress(path: Path, data: bytes) -> None:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
        return
    with pyarrow.output_stream(str(path), compression="zstd") as file:
        file.write(data)


def save_dataset(folder: Path, texts: list[list[str]]) -> None:
    """As `datasets.Dataset.save_to_disk` writes it."""
    folder.mkdir(parents=True)
    names = [f"data-{i:05d}-of-{len(texts):05d}.arrow" for i in range(len(texts))]
    for name, each in zip(names, texts, strict=True):
        table = pyarrow.table({"text": each, "n": list(range(len(each)))})
        with pyarrow.OSFile(str(folder / name), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))


def test_a_folder_of_the_datasets_library(tmp_path: Path) -> None:
    save_dataset(tmp_path / "set" / "train", [["one", "two"], ["three"]])
    manifest = prepare([tmp_path / "set" / "train"], tmp_path / "out")
    tokens = [t for s in manifest.shards for t in open_token_dir(tmp_path / "out").read(0, 0, s.tokens).tolist()]
    assert bytes(t if t < 256 else 10 for t in tokens) == b"one\ntwo\nthree\n"
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    with pytest.raises(UserError, match=r"a dataset of several splits: name the one .*set/train, .*set/test"):
        prepare([tmp_path / "set"], tmp_path / "all")
    with pytest.raises(UserError, match=r"\.arrow: expected a column 'body', found text, n; name it with --field"):
        prepare([tmp_path / "set" / "train"], tmp_path / "body", field="body")
    file = next((tmp_path / "set" / "train").glob("*.arrow"))
    file.write_bytes(file.read_bytes()[:-60])
    with pytest.raises(UserError, match=r"\.arrow: not a readable arrow file"):
        prepare([tmp_path / "set" / "train"], tmp_path / "cut")
    (tmp_path / "set" / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match=r"state\.json: expected a list of _data_files"):
        prepare([tmp_path / "set" / "train"], tmp_path / "none")
