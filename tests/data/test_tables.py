"""Tables as people have them: joined, cut off, in another encoding. What cannot be read is named by row and column."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from protomamba.cli.main import main
from protomamba.data import csv_tables
from protomamba.data.blocks import BadRowError
from protomamba.data.documents import Source, pieces_of
from protomamba.data.fasta import parts_of, prepare_fasta
from protomamba.data.series import read_ts
from protomamba.data.tables import read_blocks
from protomamba.errors import UserError
from protomamba.predict.rows import read_rows

HEADER = b"user,item\n"
COLUMNS = ("user", "item")


def table(folder: Path, content: bytes, name: str = "t.csv") -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def read(path: Path, skip: bool = False) -> tuple[list[tuple[int, str, str]], list[str]]:
    """(row, user, item) of each row, and the messages of those left out."""
    bad: list[BadRowError] = []
    found = []
    for block in read_blocks(path, COLUMNS, bad.append if skip else None):
        users, items = (block.columns[name].to_pylist() for name in COLUMNS)
        found += [(block.number(i), users[i], items[i]) for i in range(len(block))]
    return found, [str(error) for error in bad]


BAD = {
    "not UTF-8": (b"b,caf\xe9\n", r"t\.csv, row 2, column 'item': expected UTF-8 text, found byte 0xe9"),
    "the header once more": (HEADER, r"t\.csv, row 2: .*the names of the columns once more"),
    "a field missing": (b"b\n", r"t\.csv, row 2: .*(found 1|got 1)"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_row_is_named_or_left_out(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    line, says = BAD[name]
    path = table(tmp_path, HEADER + b"a,x\n" + line + b"c,z\n")
    with pytest.raises(UserError, match=says):
        read(path)
    for size in (1 << 24, 8):  # in one block, and in many
        monkeypatch.setattr(csv_tables, "BLOCK_BYTES", size)
        rows, bad = read(path, skip=True)
        assert rows == [(1, "a", "x"), (3, "c", "z")] and len(bad) == 1 and "row 2" in bad[0]


def test_a_quote_that_is_never_closed_swallows_nothing(tmp_path: Path) -> None:
    path = table(tmp_path, HEADER + b'a,"x\nx"\nb,"oops\nc,z\nd,w\n')
    with pytest.raises(UserError, match=r"t\.csv, row 2: expected a closing quote"):
        read(path)
    rows, bad = read(path, skip=True)
    assert rows == [(1, "a", "x\nx"), (3, "c", "z"), (4, "d", "w")] and "row 2" in bad[0]


def test_a_quote_inside_a_value_is_a_character(tmp_path: Path) -> None:
    rows, _ = read(table(tmp_path, HEADER + b'a,5" disk\nb,z\n'))
    assert rows == [(1, "a", '5" disk'), (2, "b", "z")]


def test_other_encodings_and_line_ends_are_called_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="found UTF-16; save it as UTF-8"):
        read(table(tmp_path, "user,item\na,x\n".encode("utf-16")))
    with pytest.raises(UserError, match="found CR alone"):
        read(table(tmp_path, b"user,item\ra,x\r"))


def test_a_missing_column_is_not_mistaken_for_one_that_is_taken(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no column 'item': its columns are user, iteme2$"):
        list(read_blocks(table(tmp_path, b"user,iteme2\na,x\n"), ("iteme2", "item")))


@pytest.mark.parametrize(
    ("line", "says"),
    [
        (b'{"user": "b", "item": "\\ud800"}\n', r"row 2, column 'item': expected text, found half a surrogate pair"),
        (b'{"user": "b", "item":\n', r"row 2: expected a JSON object on each line: Expecting value at character"),
        (b'{"user": "b", "item": "\xe9"}\n', r"row 2: .*byte 0xe9 at 24 is not UTF-8"),
    ],
)
def test_a_bad_line_of_json_is_named(line: bytes, says: str, tmp_path: Path) -> None:
    path = table(tmp_path, b'{"user": "a", "item": "x"}\n' + line, "t.jsonl")
    with pytest.raises(UserError, match=says):
        read(path)


def test_a_byte_order_mark_is_no_part_of_what_follows(tmp_path: Path) -> None:
    """Spreadsheets and editors write one; the model must not read it, and no reader may stumble on it."""
    mark = b"\xef\xbb\xbf"
    fasta = table(tmp_path, mark + b">a\nACGT\n", "a.fa")
    assert {part.name for part in parts_of(fasta)} == {"a"}
    series = table(tmp_path, mark + b"@classLabel true x y\n@data\n1,2:x\n", "a.ts")
    assert [label for _, label, _ in read_ts(series)] == ["x"]
    text = table(tmp_path, mark + b"hello\n", "a.txt")
    assert b"".join(piece.data for piece in pieces_of(Source(text, "a.txt", "text"), "text")) == b"hello\n"
    raw = pieces_of(Source(text, "a.txt", "bytes"), "text")
    assert b"".join(piece.data for piece in raw) == mark + b"hello\n"
    lines = table(tmp_path, mark + b"1 2\n", "b.txt")
    assert next(read_rows(lines)).fields == {"line": "1 2"}


def test_a_label_that_the_header_of_a_ts_file_does_not_list(tmp_path: Path) -> None:
    path = table(tmp_path, b"@classLabel true x y\n@data\n1,2:x\n3,4:?\n", "a.ts")
    with pytest.raises(UserError, match=r"a\.ts, line 4: expected a label of @classLabel \(x, y\), found '\?'"):
        list(read_ts(path))
    assert len(list(read_ts(path, any_label=True))) == 2


def test_dna_of_which_nothing_is_known_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"a\.fa: expected records of DNA, found only N"):
        prepare_fasta([table(tmp_path, b">a\nNNNN\n", "a.fa")], tmp_path / "out")


def test_a_file_that_is_given_twice_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(table(tmp_path, b">a\nACGT\n", "a.fa"))
    for kind in (["fasta"], []):
        given = [*kind, path, path, "--out-dir", str(tmp_path / "out"), *([] if kind else ["--format", "text"])]
        assert main(["prepare", *given]) == 2
        assert "a.fa: is given twice" in capsys.readouterr().err


def test_what_was_meant_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = str(table(tmp_path, b"hello hello\n", "a.txt"))
    out = ["--out-dir", str(tmp_path / "out")]
    for arguments, code, says in (
        (
            ["prepare", "event", "x.csv", *out],
            2,
            "prepare event: there is no such kind, and no such file (did",
        ),
        (["prepare", path, "--tokenizer", path, *out], 1, f"{path}: not a readable tokenizers file"),
        (["train", path, *out], 1, f"{path}: is a file, not a prepared folder; protomamba prepare makes one"),
    ):
        assert main(arguments) == code
        assert says in capsys.readouterr().err


def test_a_ts_file_costs_no_more_than_its_values(tmp_path: Path) -> None:
    """A header without end, and a line so long that all its words at once would take 30 times its memory."""
    endless = table(tmp_path, b"@x\n" * 30_000, "a.ts")
    with pytest.raises(
        UserError, match=r"a\.ts, line 10,001: expected @data within the first 10,000 lines, found '@x'"
    ):
        list(read_ts(endless))
    long = table(tmp_path, b"@classLabel true x\n@data\n" + b"1," * 1_000_000 + b"2.5:3,?:x\n", "b.ts")
    tracemalloc.start()
    ((_, label, values),) = read_ts(long)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
    tracemalloc.stop()
    assert label == "x" and values.shape == (1_000_001, 2) and values[-1, 0] == 2.5 and values[0].tolist() == [1.0, 3.0]
    assert np.isnan(values[1:, 1]).all() and (values[:-1, 0] == 1).all()


@pytest.mark.parametrize(
    ("value", "where"), [('["a", "\\ud800"]', "row 2, column 'item'"), ('{"a": "\\ud800"}', "column 'item'")]
)
def test_half_a_character_within_a_value_is_named(value: str, where: str, tmp_path: Path) -> None:
    first = '["a", "b"]' if value.startswith("[") else "{}"
    lines = f'{{"user": "a", "item": {first}}}\n{{"user": "b", "item": {value}}}\n'
    with pytest.raises(UserError, match=rf"{where}: expected text, found half a surrogate pair"):
        read(table(tmp_path, lines.encode(), "t.jsonl"))
