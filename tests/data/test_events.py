"""From tables of events to sequences of items: against a plain definition, in every format, and each defect's line."""

from __future__ import annotations

import gzip
import json
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data import csv_tables, event_buckets
from protomamba.data.events import EventOptions, prepare_events
from protomamba.data.prepared import Prepared, open_prepared
from protomamba.data.sequences import SequenceSet
from protomamba.data.vocabulary import RESERVED, UNKNOWN, Vocabulary
from protomamba.errors import ConfigError, UserError

Row = tuple[str, int, str]  # user, time, item
OPTIONS = EventOptions("user", "item", "time")


def write_csv(path: Path, rows: Sequence[Sequence[object]], header: str = "user,time,item") -> Path:
    path.write_text(header + "\n" + "".join(",".join(map(str, row)) + "\n" for row in rows))
    return path


def prepared(rows: Sequence[Row], **options: Any) -> Prepared:
    folder = Path(tempfile.mkdtemp())
    prepare_events([write_csv(folder / "e.csv", rows)], folder / "out", EventOptions("user", "item", "time", **options))
    return open_prepared(folder / "out")


def sequences(dataset: Prepared, part: str = "train") -> list[tuple[list[Any], list[Any]]]:
    """(items before the first target, target items) of every sequence of a part; unknown ones as None."""
    if part != "train" and part not in dataset.held_out:
        return []
    source = dataset.part(part)
    assert isinstance(source, SequenceSet) and dataset.vocabulary is not None
    vocabulary = dataset.vocabulary

    def name(token: int) -> Any:
        return None if token == UNKNOWN else vocabulary.name(token)

    return [
        tuple([name(t) for t in source.store.read(0, *span).tolist()] for span in ((a, b), (b, c)))  # type: ignore[misc]
        for a, b, c in source.spans.tolist()
    ]


def defined(rows: Sequence[Row]) -> list[list[str]]:
    """The definition: a user's events by time, ties in the order of the table."""
    users: dict[str, list[tuple[int, str]]] = {}
    for user, time, item in rows:
        users.setdefault(user, []).append((time, item))
    return [[item for _, item in sorted(events, key=lambda event: event[0])] for events in users.values()]


rows_ = st.lists(
    st.tuples(st.sampled_from(["ann", "bob", "c c", "δ", "7"]), st.integers(-3, 5), st.sampled_from("pqrstu")),
    min_size=1,
    max_size=40,
)


@settings(max_examples=60, deadline=None)
@given(rows=rows_, buckets=st.integers(1, 4), block=st.integers(8, 200))
def test_each_user_is_one_sequence_in_order(rows: list[Row], buckets: int, block: int) -> None:
    """Whatever the number of temporary files, and wherever the blocks of the table end."""
    before = event_buckets.BUCKET_BYTES, csv_tables.BLOCK_BYTES
    size = sum(len(f"{u},{t},{i}\n".encode()) for u, t, i in rows) + 15
    event_buckets.BUCKET_BYTES, csv_tables.BLOCK_BYTES = size // buckets + 1, block
    try:
        dataset = prepared(rows, split="user", valid=0.3, test=0.3) if len(rows) > 200 else prepared(rows)
    finally:
        event_buckets.BUCKET_BYTES, csv_tables.BLOCK_BYTES = before
    expected = defined(rows)
    found = Counter(tuple(items) for _, items in sequences(dataset))
    assert found == Counter(tuple(items[:-2] if len(items) > 2 else items) for items in expected)
    for part, left in (("valid", 2), ("test", 1)):
        held = Counter((tuple(before), *items) for before, items in sequences(dataset, part))
        assert held == Counter((tuple(items[:-left]), items[-left]) for items in expected if len(items) > 2)


def test_items_are_numbered_by_how_common_they_are() -> None:
    dataset = prepared([("a", 1, "x"), ("a", 2, "y"), ("b", 1, "y"), ("b", 2, "z")])
    assert dataset.vocabulary is not None
    assert [dataset.vocabulary.name(token) for token in (2, 3, 4)] == ["y", "x", "z"]
    assert dataset.training.info.vocab_size == 5 and dataset.training.info.reserved == (0, 1)
    assert dataset.training.info.reset and dataset.training.info.preset == "events"
    assert dataset.training.info.recipe == {"kind": "events", "group": "user", "item": "item", "order": "time"}


def test_by_time_nothing_that_is_trained_is_later_than_what_is_held_out() -> None:
    rows = [(f"u{i % 7}", (i * 37) % 101, f"i{(i * 37) % 101}") for i in range(100)]
    dataset = prepared(rows, split="time", valid=0.2, test=0.1)
    times = {
        part: [int(str(item)[1:]) for _, items in sequences(dataset, part) for item in items]
        for part in ("train", "valid", "test")
    }
    assert max(times["train"]) < min(times["valid"]) and max(times["valid"]) < min(times["test"])
    assert [len(times[part]) for part in ("train", "valid", "test")] == [70, 20, 10]
    for before, _ in sequences(dataset, "test"):
        assert all(int(str(item)[1:]) < min(times["test"]) for item in before)


def test_by_user_the_draw_is_the_users_own() -> None:
    rows = [(f"u{i}", t, f"i{i}") for i in range(200) for t in range(2)]
    parts = {part: sequences(prepared(rows, split="user"), part) for part in ("train", "valid", "test")}
    sizes = [len(parts[part]) for part in ("train", "valid", "test")]
    assert sum(sizes) == 200 and 8 < sizes[1] < 35 and 8 < sizes[2] < 35
    assert not any(before for part in parts.values() for before, _ in part)
    fewer = sequences(prepared(rows[:200], split="user"), "test")
    assert {items[0] for _, items in fewer} < {items[0] for _, items in parts["test"]}, "other users change nothing"


def test_rare_items_are_unknown_and_told() -> None:
    dataset = prepared([("a", 1, "x"), ("a", 2, "y"), ("b", 1, "x")], min_count=2)
    assert sorted(sequences(dataset)) == [([], ["x"]), ([], ["x", None])]
    assert dataset.training.class_counts().tolist() == [0, 0, 2]
    assert any("1 of the 3 events are of items seen fewer than 2 times" in note for note in dataset.training.notes)


def test_an_earlier_vocabulary_keeps_its_tokens(tmp_path: Path) -> None:
    first = prepared([("a", 1, "x"), ("a", 2, "y"), ("a", 3, "y")]).vocabulary
    assert first is not None
    table = write_csv(tmp_path / "new.csv", [("a", 1, "z"), ("a", 2, "z"), ("b", 1, "w"), ("b", 2, "x")])
    manifest = prepare_events([table], tmp_path / "out", OPTIONS, vocabulary=first)
    found = open_prepared(tmp_path / "out").vocabulary
    assert found is not None and manifest.about["vocab_size"] == found.size == 6
    assert [found.name(token) for token in (2, 3, 4, 5)] == ["y", "x", "z", "w"]


def test_a_vocabulary_goes_through_arrays_and_finds_its_items() -> None:
    vocabulary = Vocabulary.of(["10", "7", "-3"], integers=True)
    again = Vocabulary.from_state({key: value.copy() for key, value in vocabulary.state().items()})
    assert [again.name(token) for token in range(RESERVED, again.size)] == [10, 7, -3]
    assert again.encode([7, "10", 99]).tolist() == [3, 2, UNKNOWN]
    assert again.identity == vocabulary.identity != Vocabulary.of(["10", "7"]).identity
    with pytest.raises(IndexError, match="token 1 is no item"):
        vocabulary.name(UNKNOWN)
    state = vocabulary.state()
    for broken in ({}, {**state, "offsets": state["offsets"] + 1}, {**state, "offsets": state["offsets"][::-1]}):
        with pytest.raises(UserError, match="vocabulary: damaged"):
            Vocabulary.from_state(broken)


EVENTS: list[Row] = [("ann", 3, "5"), ("bob", 1, "6"), ("ann", 1, "6"), ("ann", 2, "70"), ("bob", 2, "5")]


def write_all_formats(folder: Path) -> list[Path]:
    rows = [{"user": u, "time": t, "item": int(i)} for u, t, i in EVENTS]
    table = pa.Table.from_pylist(rows)
    csv = write_csv(folder / "a.csv", EVENTS)
    (folder / "b.csv.gz").write_bytes(gzip.compress(csv.read_bytes()))
    with pa.output_stream(str(folder / "c.csv.zst"), compression="zstd") as file:
        file.write(csv.read_bytes())
    (folder / "d.tsv").write_text(csv.read_text().replace(",", "\t"))
    (folder / "e.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(table, folder / "f.parquet")
    times = pa.array([t * 10**6 for _, t, _ in EVENTS], pa.timestamp("us"))
    categories = table["user"].combine_chunks().dictionary_encode()
    typed = table.set_column(1, "time", times).set_column(0, "user", categories)
    pq.write_table(typed, folder / "g.parquet")
    dates = [(f'"{u}"', f"2024-01-0{t}T00:00:00", i) for u, t, i in EVENTS]
    write_csv(folder / "h.csv", dates)
    write_csv(folder / "i.csv", [(u, t / 2 if t > 1 else t, i) for u, t, i in EVENTS])
    (folder / "j.csv").write_text("\ufeff" + csv.read_text().replace("\n", "\r\n"), encoding="utf-8")
    lists = [{"user": "ann", "item": [6, 70, 5]}, {"user": "bob", "item": [6]}, {"user": "bob", "item": [5]}]
    (folder / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lists))
    pq.write_table(pa.Table.from_pylist(lists), folder / "l.parquet")
    return sorted(folder.iterdir())


def test_every_format_gives_the_same_sequences(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for path in write_all_formats(tmp_path / "in"):
        order = None if path.name[0] in "kl" else "time"
        options = EventOptions("user", "item", order, split="user", valid=1e-9, test=1e-9)
        prepare_events([path], tmp_path / path.name, options)
        dataset = open_prepared(tmp_path / path.name)
        assert sorted(items for _, items in sequences(dataset)) == [[6, 5], [6, 70, 5]], path.name


def test_names_that_only_look_like_numbers_stay_as_they_are(tmp_path: Path) -> None:
    dataset = prepared([("a", 1, "007"), ("a", 2, "8")])
    assert sequences(dataset) == [([], ["007", "8"])]


def test_several_tables_are_one(tmp_path: Path) -> None:
    one, other = write_csv(tmp_path / "1.csv", EVENTS[:2]), write_csv(tmp_path / "2.csv", EVENTS[2:])
    prepare_events([one, other], tmp_path / "two", EventOptions("user", "item", "time"))
    prepare_events([write_csv(tmp_path / "all.csv", EVENTS)], tmp_path / "one", EventOptions("user", "item", "time"))
    assert (tmp_path / "two" / "tokens.bin").read_bytes() == (tmp_path / "one" / "tokens.bin").read_bytes()


def test_the_same_call_again_returns_what_is_there_and_another_is_refused(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "e.csv", EVENTS)
    first = prepare_events([table], tmp_path / "out", OPTIONS)
    stamp = (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns
    assert prepare_events([table], tmp_path / "out", OPTIONS) == first
    assert (tmp_path / "out" / "tokens.bin").stat().st_mtime_ns == stamp
    with pytest.raises(UserError, match="made from other inputs or with other options"):
        prepare_events([table], tmp_path / "out", EventOptions("user", "item"))
    (tmp_path / "out" / "spans-train.npy").write_bytes(b"")
    with pytest.raises(UserError, match=r"spans-train\.npy: damaged or replaced"):
        prepare_events([table], tmp_path / "out", OPTIONS)
    with pytest.raises(UserError, match=r"spans-train\.npy: damaged or replaced"):
        open_prepared(tmp_path / "out")
    assert not list((tmp_path / "out").glob(".prepare-*"))


HEADER = "user,time,item\n"
BAD: dict[str, tuple[str, str, str]] = {
    "a missing column": ("a.csv", "user,when,item\na,1,x\n", r"a\.csv: no column 'time'.*columns are user, when, item"),
    "two columns of a name": ("a.csv", "user,user,item\n", r"a\.csv, line 1: .*'user' twice"),
    "no header": ("a.csv", "", "expected the names of the columns"),
    "only a header": ("a.csv", HEADER, "expected events, found no row"),
    "a short line": ("a.csv", HEADER + "a,1,x\nb,2\n", r"a\.csv, row 2: .*Expected 3 columns, got 2"),
    "an empty user": ("a.csv", HEADER + "a,1,x\n,2,y\n", r"a\.csv, row 2, column 'user': .*found nothing"),
    "an empty item": ("a.csv", HEADER + "a,1,\n", r"a\.csv, row 1, column 'item': .*found nothing"),
    "no time": ("a.csv", HEADER + "a,1,x\na,2,x\na,,x\n", r"a\.csv, row 3, column 'time': .*found nothing"),
    "mixed times": (
        "a.csv",
        HEADER + "a,1,x\na,noon,x\n",
        r"row 2, column 'time': expected a number as in the .*'noon'",
    ),
    "nan as a time": ("a.csv", HEADER + "a,1.5,x\na,nan,x\n", r"row 2, column 'time': expected a number"),
    "not a table": ("a.pdf", "x", r"a\.pdf: expected a table"),
    "broken gzip": ("a.csv.gz", HEADER, r"a\.csv\.gz: broken gzip"),
    "broken zstd": ("a.csv.zst", HEADER, r"a\.csv\.zst: broken Zstandard"),
    "broken parquet": ("a.parquet", HEADER, r"a\.parquet: not a readable parquet file"),
    "not JSON": ("a.jsonl", '{"user":"a","time":1,"item":"x"}\n{"user"\n', r"a\.jsonl, row 2: expected a JSON object"),
    "a list of JSON": ("a.jsonl", "[1]\n", r"a\.jsonl, row 1: expected a JSON object, found list"),
    "mixed items": (
        "a.jsonl",
        '{"user":"a","time":1,"item":"x"}\n{"user":"a","time":2,"item":5}\n',
        r"a\.jsonl, row 2, column 'item': expected text as in the rows before, found 5",
    ),
    "a key less": (
        "a.jsonl",
        '{"user":"a","time":1,"item":"x"}\n{"user":"a","time":2}\n',
        r"a\.jsonl, row 2, column 'item': .*found nothing",
    ),
    "an empty group": (
        "a.jsonl",
        '{"user":"a","time":1,"item":[1]}\n{"user":"a","time":2,"item":[]}\n',
        r"a\.jsonl, row 2, column 'item': expected a list of at least one item, found nothing",
    ),
    "a list and none": (
        "a.jsonl",
        '{"user":"a","time":1,"item":[1]}\n{"user":"a","time":2,"item":1}\n',
        r"a\.jsonl, row 2, column 'item': expected a list in every row or in none",
    ),
    "items that are fractions": (
        "a.jsonl",
        '{"user":"a","time":1,"item":1.5}\n',
        r"column 'item': expected names or whole numbers, found double",
    ),
    "no such file": ("", "", r"gone\.csv: cannot be read"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_table_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    file, text, says = BAD[name]
    path = tmp_path / (file or "gone.csv")
    if file:
        path.write_text(text)
    with pytest.raises(UserError, match=says) as error:
        prepare_events([path], tmp_path / "out", OPTIONS)
    assert "\n" not in str(error.value)


def test_a_cut_gzip_and_bytes_that_are_no_text(tmp_path: Path) -> None:
    whole = gzip.compress((HEADER + "a,1,x\n" * 9999).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[:-20])
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"a,1,x\na,2,\xff\n")
    for name, says in (
        ("cut.csv.gz", "broken gzip"),
        ("latin.csv", r"latin\.csv, row 2, column 'item': expected UTF-8"),
    ):
        with pytest.raises(UserError, match=says):
            prepare_events([tmp_path / name], tmp_path / "out", OPTIONS)


def test_a_row_is_counted_through_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 64)
    rows = [("a", n, "x") for n in range(100)]
    bad_rows = ((("a", "soon", "x"), "expected a number as in the rows"), (("", 1, "x"), "expected a name"))
    for bad, says in bad_rows:
        with pytest.raises(UserError, match=rf"row 101, column '\w+': {says}"):
            prepare_events([write_csv(tmp_path / "e.csv", [*rows, bad])], tmp_path / "out", OPTIONS)
    with pytest.raises(UserError, match=r"row 101: .*Expected 3 columns, got 4"):
        prepare_events([write_csv(tmp_path / "e.csv", [*rows, ("a", 1, "x", 2)])], tmp_path / "out", OPTIONS)
    quoted = [("a", n, '"two\nlines, ""one"" item"') for n in range(50)]
    prepare_events([write_csv(tmp_path / "q.csv", quoted)], tmp_path / "q", OPTIONS)
    assert sequences(open_prepared(tmp_path / "q"), "test")[0][1] == ['two\nlines, "one" item']


def test_whole_numbers_that_turn_into_fractions_are_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csv_tables, "BLOCK_BYTES", 64)
    rows = [("a", 100 - n, f"i{n}") for n in range(30)] + [("a", 70.5, "half")]
    prepare_events([write_csv(tmp_path / "e.csv", rows)], tmp_path / "out", EventOptions("user", "item", "time"))
    dataset = open_prepared(tmp_path / "out")
    assert sequences(dataset)[0][1][:2] == ["half", "i29"] and dataset.training.info.targets == 29


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"split": "half"}, "--split half: expected one of last, time, user"),
        ({"min_count": 0}, "--min-count 0"),
        ({"order": None, "split": "time"}, "--split time needs --order"),
        ({"valid": 0.0}, "--valid-share 0"),
        ({"valid": 0.5, "test": 0.5}, "leave nothing to train on"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare_events([tmp_path / "a.csv"], tmp_path, EventOptions("user", "item", **{"order": "time", **options}))


def test_a_split_without_training_and_a_count_without_items(tmp_path: Path) -> None:
    table = write_csv(tmp_path / "e.csv", [("a", 1, "x")])
    with pytest.raises(UserError, match="--min-count 2: no item occurs so often"):
        prepare_events([table], tmp_path / "a", EventOptions("user", "item", min_count=2))
    with pytest.raises(UserError, match="--split time: leaves no event to train on"):
        prepare_events([table], tmp_path / "b", EventOptions("user", "item", "time", split="time"))


def test_a_folder_that_is_something_else(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"of": "another program"}')
    table = write_csv(tmp_path / "e.csv", EVENTS)
    with pytest.raises(UserError, match=r"is an input and lies in --out-dir"):
        prepare_events([table], tmp_path, OPTIONS)
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "manifest.json").write_text('{"of": "another program"}')
    with pytest.raises(UserError, match="holds other data; choose an empty --out-dir"):
        prepare_events([table], tmp_path / "x", OPTIONS)
    dataset = prepared([*EVENTS, ("ann", 9, "5")])
    with pytest.raises(UserError, match="has no dev part, only train, valid, test"):
        dataset.part("dev")
    assert np.isin(dataset.training.info.reserved, [0, 1]).all()
