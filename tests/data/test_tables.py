"""Tables as people have them: joined, cut off, in another encoding. What cannot be read is named by row and column."""

from __future__ import annotations

from pathlib import Path

import pytest

from protomamba.data import csv_tables
from protomamba.data.blocks import BadRowError
from protomamba.data.tables import read_blocks
from protomamba.errors import UserError

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
