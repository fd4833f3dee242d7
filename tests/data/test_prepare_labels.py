"""Labelled sequences from tables, .ts and .npz files: what comes out is what went in, each defect has its place."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data.labelled_tables import LabelColumns
from protomamba.data.labels import IGNORED, LabelledSequences
from protomamba.data.prepare_labels import prepare_labels
from protomamba.data.prepared import Prepared, open_prepared
from protomamba.data.source import StreamSpec
from protomamba.errors import ConfigError, UserError

SERIES = LabelColumns("lab", values=("x", "y"), group="id", order="t")


def prepared(folder: Path, text: str, columns: LabelColumns, name: str = "a.csv", **parts: Any) -> Prepared:
    (folder / name).write_text(text)
    prepare_labels([folder / name], folder / "out", columns, **parts)
    return open_prepared(folder / "out")


def contents(data: Prepared, part: str = "train") -> list[tuple[list[Any], str]]:
    """The steps of every sequence, raw again where they were standardised, and its class."""
    source = data.part(part)
    assert isinstance(source, LabelledSequences)
    info, found = source.info, []
    for place in range(len(source)):
        steps, labels = source.read(np.array([place]))
        assert (labels[0, :-1] == IGNORED).all()
        if info.input == "vector":
            assert info.recipe is not None
            steps = steps * np.array(info.recipe["std"]) + np.array(info.recipe["mean"])
            found.append((np.round(steps[0], 3).tolist(), info.class_names[labels[0, -1]]))
        else:
            found.append((steps[0].tolist(), info.class_names[labels[0, -1]]))
    return found


pairs = st.tuples(st.integers(-9, 9), st.integers(-9, 9))


@settings(max_examples=40, deadline=None)
@given(
    series=st.lists(st.lists(pairs, min_size=1, max_size=5), min_size=2, max_size=6),
    random=st.randoms(use_true_random=False),
)
def test_a_row_a_step_gives_each_group_in_order(
    series: list[list[tuple[int, int]]], random: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    rows = [f"g{i},{t},{i % 2},{x},{y}" for i, each in enumerate(series) for t, (x, y) in enumerate(each)]
    random.shuffle(rows)
    data = prepared(tmp_path_factory.mktemp("labels"), "\n".join(["id,t,lab,x,y", *rows]) + "\n", SERIES)
    expected = [([[float(x), float(y)] for x, y in each], str(i % 2)) for i, each in enumerate(series)]
    assert sorted(contents(data)) == sorted(expected)


def test_values_are_standardised_by_the_training_part_and_missing_ones_stay_so(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("id,t,lab,x,y\n1,1,b,100,5\n")
    rows = "id,t,lab,x,y\n1,1,a,1,5\n1,2,a,3,\n2,1,b,?,5\n"
    data = prepared(tmp_path, rows, SERIES, test=[tmp_path / "test.csv"])
    batch = data.training.stream(StreamSpec(2, 9))[0]
    assert batch.tokens_BL.dtype == torch.float32 and batch.tokens_BL.shape == (2, 2, 2)
    values = batch.tokens_BL[~torch.isnan(batch.tokens_BL)]
    assert sorted(values.tolist()) == [-1, 0, 0, 1], "x is 1 and 3, y is always 5"
    assert int(torch.isnan(batch.tokens_BL).sum()) == 4
    test = data.part("test").stream(StreamSpec(1, 9))[0]
    assert test.tokens_BL.tolist() == [[[98, 0]]] and test.targets_BL.tolist() == [[1]]
    assert any("missing" in note for note in data.training.notes)


def test_what_the_data_says_of_itself(tmp_path: Path) -> None:
    data = prepared(tmp_path, "id,t,lab,x,y\n1,1,10,1,5\n1,2,10,3,\n2,1,9,?,5\n3,1,9,1,1\n", SERIES)
    info = data.training.info
    assert (info.input, info.channels, info.n_class, info.class_names) == ("vector", 2, 2, ("9", "10"))
    assert (info.preset, info.longest, info.targets, info.reset) == ("classify", 2, 3, False)
    assert data.training.class_counts().tolist() == [2, 1]
    data.training.check(vocab_size=1, classes=2, seq_len=2)
    with pytest.raises(UserError, match=r"train-values\.npy, row 0: expected at most --seq-len 1"):
        data.training.check(vocab_size=1, classes=2, seq_len=1)
    training, held_out = data.training.split(0.34, 0)
    assert sum(part.class_counts().sum() for part in (training, held_out)) == 3


def test_a_row_a_sequence_of_text_tokens_or_values(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    text = prepared(tmp_path / "a", "lab,s\nno,äb\nyes,c d\n", LabelColumns("lab", text="s"))
    assert contents(text) == [([0xC3, 0xA4, 98], "no"), ([99, 32, 100], "yes")]
    assert json.loads(text.training.info.tokenizer or "")["kind"] == "bytes"
    (tmp_path / "b").mkdir()
    words = prepared(tmp_path / "b", 'lab,s\nno,7 x\nyes,"x, 9"\n', LabelColumns("lab", tokens="s"))
    assert contents(words) == [([2, 3], "no"), ([3, 4], "yes")]
    assert words.vocabulary is not None and words.vocabulary.tokens == {"7": 2, "x": 3, "9": 4}
    assert words.training.info.vocab_size == 5
    (tmp_path / "c").mkdir()
    values = prepared(tmp_path / "c", "p1,p2,lab,p3\n1,2,no,3\n4,,yes,\n", LabelColumns("lab", values=("p*",)))
    assert contents(values) == [([[1.0], [2.0], [3.0]], "no"), ([[4.0]], "yes")]


def test_lists_in_json_lines_and_words_that_only_the_test_has(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"lab": "no", "s": [1, 3]}\n')
    rows = '{"lab": "no", "s": [1, 2]}\n{"lab": "yes", "s": [2]}\n'
    columns = LabelColumns("lab", tokens="s")
    data = prepared(tmp_path, rows, columns, name="a.jsonl", test=[tmp_path / "test.jsonl"])
    assert contents(data) == [([2, 3], "no"), ([3], "yes")] and contents(data, "test") == [([2, 1], "no")]


TS = """# a comment
@problemName Tiny
@timeStamps false
@missing true
@univariate false
@dimensions 2
@classLabel true up down
@data
1,2,3:4,?,6:up
7:8,9:down
"""


def test_ts_files_with_channels_gaps_and_lengths_of_their_own(tmp_path: Path) -> None:
    data = prepared(tmp_path, TS, LabelColumns(), name="a.ts")
    (first, up), (second, down) = contents(data)
    assert (up, down) == ("up", "down") and first[0] == [1, 4] and first[2] == [3, 6] and first[1][0] == 2
    assert np.isnan(first[1][1]) and second[0] == [7, 8] and np.isnan(second[1][0]) and second[1][1] == 9
    (tmp_path / "b.ts.gz").write_bytes(gzip.compress(TS.encode()))
    prepare_labels([tmp_path / "b.ts.gz"], tmp_path / "gz", LabelColumns())
    assert (tmp_path / "gz" / "train-values.npy").read_bytes() == (tmp_path / "out" / "train-values.npy").read_bytes()


def test_arrays(tmp_path: Path) -> None:
    values = np.arange(12.0).reshape(3, 2, 2)
    values[1, 1] = np.nan  # nothing known at its end: a series of one step
    np.savez(tmp_path / "a.npz", X=values, y=np.array([0, 1, 1]), lengths=np.array([2, 2, 1]))
    prepare_labels([tmp_path / "a.npz"], tmp_path / "out", LabelColumns())
    found = contents(open_prepared(tmp_path / "out"))
    assert found == [([[0, 1], [2, 3]], "0"), ([[4, 5]], "1"), ([[8, 9]], "1")]
    np.savez(tmp_path / "b.npz", signal=np.ones((2, 3), np.int16), kind=np.array(["a", "b"]))
    prepare_labels([tmp_path / "b.npz"], tmp_path / "b", LabelColumns("kind", values=("signal",)))
    assert contents(open_prepared(tmp_path / "b")) == [([[1]] * 3, "a"), ([[1]] * 3, "b")]


def test_the_same_call_again_and_rare_classes(tmp_path: Path) -> None:
    rows = "lab,s\n" + "no,x y\n" * 9 + "yes,z\n"
    data = prepared(tmp_path, rows, LabelColumns("lab", tokens="s"))
    assert "class 'yes' has 1 sequence and the most common 9: --class-weights balanced" in data.training.notes[0]
    assert prepare_labels([tmp_path / "a.csv"], tmp_path / "out", LabelColumns("lab", tokens="s"))
    with pytest.raises(UserError, match="made from other inputs or with other options"):
        prepare_labels([tmp_path / "a.csv"], tmp_path / "out", LabelColumns("lab", text="s"))


H = "id,t,lab,x,y\n"
TOKENS, TEXT = LabelColumns("lab", tokens="s"), LabelColumns("lab", text="s")
ROWS, NONE = LabelColumns("lab", values=("p",)), LabelColumns()
BAD: dict[str, tuple[str, str, LabelColumns, str]] = {
    "a missing column": ("a.csv", "id,t,lab,x\n1,1,a,1\n", SERIES, r"a\.csv: no column 'y'"),
    "no such label": ("a.csv", "s\nx\n", TOKENS, r"a\.csv: no column 'lab'"),
    "a word for a number": (
        "a.csv",
        H + "1,1,a,1,2\n1,2,a,x,2\n",
        SERIES,
        r"row 2, column 'x': .* a number.*'x'",
    ),
    "an infinite value": ("a.csv", H + "1,1,a,inf,2\n", SERIES, r"row 1, column 'x': expected a finite number"),
    "two labels": (
        "a.csv",
        H + "1,1,a,1,2\n2,1,b,1,1\n1,2,b,1,2\n",
        SERIES,
        r"row 3, column 'lab': expected 'a'",
    ),
    "an empty label": ("a.csv", H + "1,1,,1,2\n", SERIES, r"row 1, column 'lab': .*found nothing"),
    "an empty sequence": ("a.csv", "lab,s\na,x\nb, \n", TOKENS, r"row 2, column 's': expected tokens.*found ' '"),
    "an empty text": ("a.csv", "lab,s\na,x\nb,\n", TEXT, r"row 2, column 's': expected a text, found nothing"),
    "a series without a value": (
        "a.csv",
        "lab,p\na,1\nb,\n",
        LabelColumns("lab", values=("p",)),
        r"row 2: expected a seq",
    ),
    "one class": ("a.csv", "lab,s\na,x\na,y\n", TOKENS, r"row 1: expected at least two classes, found only 'a'"),
    "no row": ("a.csv", "lab,s\n", TOKENS, r"a\.csv: expected labelled sequences, found none"),
    "no row of a group": ("a.csv", H, SERIES, r"a\.csv: expected sequences, found no row"),
    "numbers to estimate": (
        "a.csv",
        "lab,s\n" + "".join(f"{i / 7},x\n" for i in range(30)),
        TOKENS,
        r"row 1: expected labels that several sequences share, found 30 different ones",
    ),
    "ts without data": (
        "a.ts",
        "@classLabel true a\n",
        NONE,
        r"a\.ts: expected a \.ts file, found no line",
    ),
    "ts without a header": ("a.ts", "1,2:a\n", NONE, r"a\.ts, line 1: expected a line of the header"),
    "ts without labels": (
        "a.ts",
        "@classLabel false\n@data\n1\n",
        NONE,
        r"line 2: expected a label with",
    ),
    "ts with times": ("a.ts", "@timeStamps true\n@data\n", NONE, r"line 1: expected values without time"),
    "ts with a word": (
        "a.ts",
        "@data\n1,2:a\n1,zwei:b\n",
        NONE,
        r"line 3: expected finite numbers .*'zwei'",
    ),
    "ts without a label": ("a.ts", "@data\n1,2\n", NONE, r"line 2: expected channels of values and a label"),
    "ts of other channels": ("a.ts", "@data\n1:2:a\n1:b\n", NONE, r"line 3: expected 2 channels .* found 1"),
    "a broken npz": ("a.npz", "PK", NONE, r"a\.npz: not a readable \.npz"),
    "no columns": ("a.csv", "lab,s\na,x\n", NONE, r"a\.csv: name the columns: --label COLUMN and one of"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    file, text, columns, says = BAD[name]
    with pytest.raises(UserError, match=says) as error:
        prepared(tmp_path, text, columns, name=file)
    assert "\n" not in str(error.value)


def test_a_label_never_seen_and_arrays_that_do_not_fit(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("lab,s\na,x\nc,x\n")
    with pytest.raises(UserError, match=r"test\.csv, row 2, column 'lab': expected a label that training has .a, b"):
        prepared(tmp_path, "lab,s\na,x\nb,x\n", TOKENS, test=[tmp_path / "test.csv"])
    for arrays, says in (
        ({"X": np.ones((2, 3))}, "no array 'y': it holds X; name it with --label"),
        ({"X": np.ones((2, 3)), "y": np.ones(3)}, "expected numbers N x steps .x channels. and N labels"),
        ({"X": np.full((2, 3), np.inf), "y": np.ones(2)}, r"row 1: expected finite numbers"),
    ):
        np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=says):
            prepare_labels([tmp_path / "a.npz"], tmp_path / "out", LabelColumns())


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        (LabelColumns("l", text="a", tokens="b"), "--text and --tokens exclude each other"),
        (LabelColumns("l", text="a", group="g"), "--group takes --tokens or --values"),
        (LabelColumns("l", tokens="a", order="t"), "--order orders the rows of a --group"),
    ],
)
def test_columns_that_do_not_go_together(columns: LabelColumns, says: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says):
        prepare_labels([tmp_path / "a.csv"], tmp_path / "out", columns)
