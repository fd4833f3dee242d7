"""Rows of every format, the choice of columns, and what is wrong with a row."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import numpy as np
import pytest

from protomamba import UserError
from protomamba.data.tokenizer import ByteTokenizer
from protomamba.predict.examples import Example, ExampleReader
from protomamba.predict.rows import read_rows

WANTED = [("a", [1, 2, 3]), ("b", [4])]


def read(path: Path, skip: bool = False, **options: object) -> tuple[list[Example], ExampleReader]:
    reader = ExampleReader(path.name, 40, skip_bad=skip, **options)  # type: ignore[arg-type]
    return list(reader.examples(read_rows(path))), reader


def plain(examples: list[Example]) -> list[tuple[object, list[int]]]:
    return [(example.key, example.sequence.tolist()) for example in examples]


@pytest.mark.parametrize(
    ("name", "text", "key"),
    [
        ("x.jsonl", '{"user": "a", "items": [1, 2, 3], "n": [0]}\n\n{"user": "b", "items": [4], "n": []}\n', "user"),
        ("x.csv", "id,tokens\na,1 2 3\nb,4\n", "id"),
        ("x.csv", 'tokens,id,more\n"1,2,3",a,x\n4,b,y\n', "id"),
    ],
)
def test_named_columns(tmp_path: Path, name: str, text: str, key: str) -> None:
    (tmp_path / name).write_text(text)
    examples, reader = read(tmp_path / name)
    assert plain(examples) == WANTED and reader.columns is not None and reader.columns.key_name == key


def test_lines_lists_and_arrays_are_named_by_their_number(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"1 2 3\r\n4\n")
    (tmp_path / "x.jsonl").write_text("[1, 2, 3]\n\n[4]\n")
    (tmp_path / "y.txt.gz").write_bytes(gzip.compress(b"1 2 3\n4", mtime=0))
    np.save(tmp_path / "x.npy", np.array([[1, 2], [3, 4]]))
    assert plain(read(tmp_path / "x.txt")[0]) == plain(read(tmp_path / "y.txt.gz")[0]) == [(1, [1, 2, 3]), (2, [4])]
    assert plain(read(tmp_path / "x.jsonl")[0]) == [(1, [1, 2, 3]), (3, [4])]
    examples, reader = read(tmp_path / "x.npy")
    assert plain(examples) == [(1, [1, 2]), (2, [3, 4])] and reader.columns is not None
    assert reader.columns.key_name == "row"


def test_parquet(tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"user": ["a", "b"], "items": [[1, 2, 3], [4]]})
    parquet.write_table(table, tmp_path / "x.parquet")
    assert plain(read(tmp_path / "x.parquet")[0]) == WANTED


def test_text_becomes_tokens_behind_the_end_of_a_document(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text('text,id\n"h,\ni",7\n')
    reader = ExampleReader("x", 257, ByteTokenizer(), start=256)
    (example,) = reader.examples(read_rows(tmp_path / "x.csv"))
    assert (example.key, example.sequence.tolist(), example.raw_bytes) == ("7", [256, *b"h,\ni"], 4)
    (tmp_path / "y.txt").write_bytes(b"\xff\xfe\n")
    (example,) = ExampleReader("y", 257, ByteTokenizer()).examples(read_rows(tmp_path / "y.txt"))
    assert example.sequence.tolist() == [255, 254]


def test_columns_can_be_chosen_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text(json.dumps({"p": [1], "q": [2], "n": 5, "m": "z"}))
    examples, _ = read(tmp_path / "x.jsonl", sequence_column="q", key_column="m")
    assert plain(examples) == [("z", [2])]
    with pytest.raises(UserError, match=r"x\.jsonl: which column is the sequence\? Found p, q, n, m"):
        read(tmp_path / "x.jsonl")
    with pytest.raises(UserError, match="--key-column k: there is no such column; found p, q, n, m"):
        read(tmp_path / "x.jsonl", sequence_column="q", key_column="k")


BAD = [
    ("x.jsonl", '{"items": [1]}\n{"items": [1, "b"]}\n', 2, "expected tokens, found 'b'"),
    ("x.jsonl", '{"items": [1]}\n{"items": [1.5]}\n', 2, "expected tokens, found '1.5'"),
    ("x.jsonl", '{"items": [1]}\n{"items": [true]}\n', 2, "expected tokens, found 'True'"),
    ("x.jsonl", '{"items": [1]}\n{"items": [99]}\n', 2, "token 99 at place 1: expected 0 to 39"),
    ("x.jsonl", '{"items": [1]}\n{"items": []}\n', 2, "expected at least one step, found none"),
    ("x.jsonl", '{"items": [1]}\n{"items": 7}\n', 2, "expected a list of tokens, found 7"),
    ("x.jsonl", '{"items": [1]}\n{"itms": [1]}\n', 2, "expected a column 'items', found itms"),
    ("x.jsonl", '{"items": [1]}\n{"items": [1}\n', 2, "expected a JSON object"),
    ("x.jsonl", '{"items": [1]}\n12\n', 2, "expected a JSON object or a list, found 12"),
    ("x.jsonl", '{"items": [1]}\n{"items": [99999999999999999999]}\n', 2, "expected tokens, found '9999"),
    ("x.csv", "id,items\na,1\nb\n", 2, "expected 2 fields, found 1"),
    ("x.csv", "id,items\na,1\nb,2,3\n", 2, "expected 2 fields, found 3"),
    ("x.csv", 'id,items\na,1\n"b"x,2\n', 2, "not a row of CSV"),
    ("x.csv", 'id,items\na,1\nb,"2\nc,3\n', 2, 'a quote (") that is never closed'),
    ("x.csv", "id,items\na,1\nid,items\n", 2, "the names of the columns once more"),
    ("x.csv", b"id,items\na,1\nb,caf\xe9\n", 2, "expected UTF-8 text, found byte 0xe9"),
    ("x.jsonl", b'{"items": "1"}\n{"items": "caf\xe9"}\n', 2, "expected UTF-8 text, found byte 0xe9"),
    ("x.jsonl", '{"items": [1]}\n{"items": null}\n', 2, "expected a value, found nothing"),
    ("x.txt", "1\n\n", 2, "expected at least one step, found none"),
]


@pytest.mark.parametrize(("name", "text", "row", "words"), BAD, ids=[str(i) for i in range(len(BAD))])
def test_a_bad_row_is_named_or_skipped(tmp_path: Path, name: str, text: str | bytes, row: int, words: str) -> None:
    (tmp_path / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert re.match(rf"{name}, row {row}(, column 'items')?: ", str(caught.value)) and words in str(caught.value)
    assert "--on-bad-row skip" in str(caught.value)
    examples, reader = read(tmp_path / name, skip=True)
    assert len(examples) == 1 and [each.row for each in reader.skipped] == [row] and words in reader.skipped[0].reason


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("x.xml", b"", "expected a name ending in .txt, .jsonl, .ndjson, .csv, .tsv, .inter, .dat, .parquet, .npy"),
        ("x.txt.gz", b"\x1f\x8b\x08broken", "broken gzip"),
        ("x.jsonl.gz", gzip.compress(b"[1]\n" * 9, mtime=0)[:-12], "broken gzip"),
        ("x.fa", b"ACGT\n", "expected FASTA"),
        ("x.npy", b"not numpy", "not a readable .npy file"),
        ("x.csv", b"", "line 1: expected the names of the columns, found nothing"),
        ("x.csv", b"items,items\n1,2\n", "found 'items' twice"),
        ("x.csv", "id,items\na,1\n".encode("utf-16"), "found UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=words):
        read(tmp_path / name)
    with pytest.raises(UserError, match="No such file"):
        read(tmp_path / "none.txt")
