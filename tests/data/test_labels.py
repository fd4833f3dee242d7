"""Labelled sequences: what is read is what was written, the order covers each epoch once, each defect has its line."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from protomamba.data.labelled_stream import LabelledStream, labelled_eval_batches
from protomamba.data.labels import IGNORED, LabelledSequences, open_labelled
from protomamba.errors import UserError

Rows = Sequence[Sequence[int]]


def write(path: Path, rows: Rows) -> Path:
    path.write_text("".join(" ".join(map(str, row)) + "\n" for row in rows))
    return path


def labelled(folder: Path, tokens: Rows, labels: Rows) -> LabelledSequences:
    return open_labelled(write(folder / "tokens.txt", tokens), write(folder / "labels.txt", labels))


def numbered(folder: Path, count: int) -> LabelledSequences:
    """Sequence i is the token i, and its label is i too."""
    return labelled(folder, [[i] for i in range(count)], [[i] for i in range(count)])


def order(stream: LabelledStream, batches: range) -> list[int]:
    return torch.cat([stream.batch(index).tokens_BL[:, 0] for index in batches]).tolist()


sequences = st.lists(
    st.lists(st.tuples(st.integers(0, 2**32 - 1), st.sampled_from([IGNORED, 0, 1, 70_000])), min_size=1, max_size=6),
    min_size=1,
    max_size=6,
)


@settings(max_examples=60, deadline=None)
@given(sequences, st.booleans(), st.sampled_from(["\n", "\r\n", "\n\n\n"]))
def test_a_label_a_token_comes_back_padded(rows: list[list[tuple[int, int]]], whole: bool, end: str) -> None:
    """With one label a line instead (`whole`) it stands at the last token, and nowhere else."""
    tokens = [[token for token, _ in row] for row in rows]
    labels = [[row[-1][1]] if whole else [label for _, label in row] for row in rows]
    if not any(label >= 0 for row in labels for label in row):
        labels[-1][-1] = 2
    with tempfile.TemporaryDirectory() as folder:
        found = labelled(Path(folder), tokens, labels)
        text = Path(folder, "tokens.txt").read_text().rstrip().replace("\n", end if end == "\r\n" else "\n") + end
        Path(folder, "tokens.txt").write_bytes(text.encode())
        again = open_labelled(Path(folder, "tokens.txt"), Path(folder, "labels.txt"))
    tokens_BL, labels_BL = found.read(np.arange(len(rows)))
    assert (again.read(np.arange(len(rows)))[0] == tokens_BL).all() and len(again) == len(found) == len(rows)
    assert tokens_BL.shape == labels_BL.shape == (len(rows), max(map(len, rows)))
    for row, (own, given_labels) in enumerate(zip(tokens, labels, strict=True)):
        expected = given_labels if not whole else [IGNORED] * (len(own) - 1) + given_labels
        padding = tokens_BL.shape[1] - len(own)
        assert tokens_BL[row].tolist() == own + [0] * padding
        assert labels_BL[row].tolist() == expected + [IGNORED] * padding


@pytest.mark.parametrize("per_token", [False, True])
def test_arrays_are_read_like_text(per_token: bool, tmp_path: Path) -> None:
    tokens, labels = np.arange(12, dtype=np.uint8).reshape(3, 4), np.array([[-100, 1, 0, 2]] * 3, dtype=np.int16)
    labels = labels if per_token else labels[:, -1]
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "labels.npy", labels)
    from_arrays = open_labelled(tmp_path / "tokens.npy", tmp_path / "labels.npy")
    from_text = labelled(tmp_path, tokens.tolist(), labels.reshape(3, -1).tolist())
    for one, other in zip(from_arrays.read(np.arange(3)), from_text.read(np.arange(3)), strict=True):
        assert (one == other).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 40), st.integers(1, 9), st.integers(0, 2**63 - 1))
def test_every_epoch_has_every_sequence_once(count: int, batch_size: int, seed: int) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = numbered(Path(folder), count)
    stream = LabelledStream(data, batch_size=batch_size, seed=seed)
    seen = order(stream, range(-(-3 * count // batch_size)))
    for epoch in range(3):
        assert sorted(seen[epoch * count : (epoch + 1) * count]) == list(range(count))
    last = len(seen) // batch_size - 1
    again = LabelledStream(data, batch_size=batch_size, seed=seed)
    assert order(again, range(last, last + 1)) == seen[-batch_size:], "a batch is a function of its number alone"


def test_the_order_is_shuffled_by_seed_and_epoch(tmp_path: Path) -> None:
    data = numbered(tmp_path, 64)
    epochs = [order(LabelledStream(data, batch_size=64, seed=seed), range(e, e + 1)) for seed in (1, 2) for e in (0, 1)]
    assert len({tuple(epoch) for epoch in [*epochs, list(range(64))]}) == 5


def test_a_saved_place_comes_back_and_other_data_or_seed_is_refused(tmp_path: Path) -> None:
    data = numbered(tmp_path, 10)
    stream = LabelledStream(data, batch_size=4, seed=3)
    for _ in range(4):
        next(stream)
    state = stream.state_dict()
    other = LabelledStream(data, batch_size=4, seed=3)
    other.load_state_dict(state)
    assert torch.equal(next(other).tokens_BL, next(stream).tokens_BL) and other.position == 5
    with pytest.raises(UserError, match=r"seed 3 .now 4"):
        LabelledStream(data, batch_size=4, seed=4).load_state_dict(state)
    (tmp_path / "labels.txt").write_text("".join(f"{9 - i}\n" for i in range(10)))
    changed = open_labelled(tmp_path / "tokens.txt", tmp_path / "labels.txt")
    with pytest.raises(UserError, match=r"labels\.txt has other contents"):
        LabelledStream(changed, batch_size=4, seed=3).load_state_dict(state)
    training, _ = data.split(0.2, seed=3)
    with pytest.raises(UserError, match="stream cursor: made with data"):
        LabelledStream(training, batch_size=4, seed=3).load_state_dict(state)


def test_held_out_sequences_are_drawn_by_seed_and_in_one_part_only(tmp_path: Path) -> None:
    data = numbered(tmp_path, 50)
    parts = [data.split(0.2, seed) for seed in (0, 0, 1)]
    held_out = [validation.chosen.tolist() for _, validation in parts]
    assert held_out[0] == held_out[1] != held_out[2] and len(held_out[0]) == 10
    assert held_out[0] != list(range(40, 50)), "a file sorted by class would lose its last classes"
    for training, validation in parts:
        assert sorted([*training.chosen, *validation.chosen]) == list(range(50))
        assert not set(order(LabelledStream(training, batch_size=8, seed=0), range(20))) & set(validation.chosen)


def test_evaluation_takes_the_same_sequences_evenly_and_all_of_them_without_a_count(tmp_path: Path) -> None:
    data = numbered(tmp_path, 20)
    few = [batch.targets_BL.flatten().tolist() for batch in labelled_eval_batches(data, 3, 2)]
    assert few == [[0, 3, 6], [10, 13, 16]]
    everything = [label for b in labelled_eval_batches(data, 3) for label in b.targets_BL.flatten().tolist()]
    assert everything == list(range(20))


GOOD_TOKENS, GOOD_LABELS = b"1 2 3\n4 5\n6\n", b"0\n1\n0\n"
BAD = {
    "a word among the tokens": (b"1 2\n3 x\n6\n", GOOD_LABELS, r"tokens\.txt, line 2, column 3.*'x'"),
    "an empty line": (b"1 2\n\n6\n", GOOD_LABELS, r"tokens\.txt, line 2: expected the tokens"),
    "no token": (b" \n\n", GOOD_LABELS, r"tokens\.txt: holds no token"),
    "a word among the labels": (GOOD_TOKENS, b"0\ncat\n0\n", r"labels\.txt, line 2: expected labels from 0.*cat"),
    "a label of -1": (GOOD_TOKENS, b"1\n-1\n1\n", r"labels\.txt, line 2: expected labels from 0 to .* or -100.*-1"),
    "a huge label": (GOOD_TOKENS, b"1\n1\n99999999\n", r"labels\.txt, line 3: expected labels from 0 to 16,777,215"),
    "an endless label": (GOOD_TOKENS, b"1\n1\n" + b"9" * 99, r"labels\.txt, line 3: expected labels"),
    "an empty label": (GOOD_TOKENS, b"0\n\n0\n", r"labels\.txt, line 2: .*empty line"),
    "no labels": (GOOD_TOKENS, b"", r"labels\.txt: expected labels for the 3 sequences.*found 0 lines"),
    "labels too few": (GOOD_TOKENS, b"0\n1\n", r"labels\.txt: expected labels for the 3 sequences.*found 2 lines"),
    "labels too many": (GOOD_TOKENS, b"0\n1\n1\n2\n", r"labels\.txt: expected .* 3 sequences .*found 4 lines"),
    "a label short": (GOOD_TOKENS, b"0 0 1\n1\n1\n", r"labels\.txt, line 2: expected 2 labels.*found 1"),
    "a label over": (GOOD_TOKENS, b"0 0 1\n1 1 1\n1\n", r"labels\.txt, line 2: expected 2 labels.*found 3"),
    "nothing labelled": (GOOD_TOKENS, b"-100\n-100\n-100\n", r"labels\.txt: every label is -100"),
    "not text": (GOOD_TOKENS, b"0\n\xff\n0\n", r"labels\.txt, line 2: expected labels"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    tokens, labels, says = BAD[name]
    (tmp_path / "tokens.txt").write_bytes(tokens)
    (tmp_path / "labels.txt").write_bytes(labels)
    with pytest.raises(UserError, match=says) as error:
        open_labelled(tmp_path / "tokens.txt", tmp_path / "labels.txt")
    assert "\n" not in str(error.value)


ARRAYS = {
    "one dimension": (np.arange(6), np.arange(6), r"tokens\.npy: expected integers in 2 dimension.*of shape 6"),
    "three dimensions": (np.zeros((2, 2, 2), int), np.zeros(2, int), r"tokens\.npy: expected integers in 2.*2 x 2 x 2"),
    "floats": (np.zeros((2, 2), int), np.zeros(2), r"labels\.npy: expected integers in 1 or 2.*float64"),
    "nothing": (np.zeros((0, 4), int), np.zeros(0, int), r"tokens\.npy: expected integers"),
    "a negative token": (np.array([[1, 2], [3, -4]]), np.zeros(2, int), r"tokens\.npy, row 1: expected tokens.*-4"),
    "a negative label": (np.ones((2, 2), int), np.array([0, -1]), r"labels\.npy, row 1: expected labels.*-1"),
    "another length": (np.ones((2, 3), int), np.ones((2, 2), int), r"labels\.npy, row 0: expected 3 labels.*found 2"),
}


@pytest.mark.parametrize("name", ARRAYS)
def test_a_bad_array_is_one_line_with_its_place(name: str, tmp_path: Path) -> None:
    tokens, labels, says = ARRAYS[name]
    np.save(tmp_path / "tokens.npy", tokens)
    np.save(tmp_path / "labels.npy", labels)
    with pytest.raises(UserError, match=says):
        open_labelled(tmp_path / "tokens.npy", tmp_path / "labels.npy")


def test_files_that_are_not_there_not_whole_or_without_lines(tmp_path: Path) -> None:
    good = write(tmp_path / "good.txt", [[1]])
    (tmp_path / "cut.npy").write_bytes(b"\x93NUMPY\x01")
    (tmp_path / "flat.bin").write_bytes(bytes(8))
    for name, says in (("none.txt", "none.txt: cannot be read"), ("cut.npy", "not a readable"), ("flat.bin", "a line")):
        with pytest.raises(UserError, match=says):
            open_labelled(tmp_path / name, good)
        with pytest.raises(UserError, match=says):
            open_labelled(good, tmp_path / name)


def test_bounds_name_file_line_and_the_flag_that_helps(tmp_path: Path) -> None:
    data = labelled(tmp_path, [[1, 2], [3, 9, 4], [5]], [[0], [2], [7]])
    assert (data.max_token, data.max_label) == (9, 7)
    data.check(vocab_size=10, classes=8, seq_len=3)
    for bounds, says in (
        (
            {"vocab_size": 9},
            r"tokens\.txt, line 2: .* vocabulary size 9, found 9; correct the file, or train with --vocab-size 10",
        ),
        ({"classes": 7}, r"labels\.txt, line 3: .* number of classes 7, found 7; use --n-class 8"),
        ({"seq_len": 2}, r"tokens\.txt, line 2: .*--seq-len 2 tokens, found 3; .* use --seq-len 3"),
    ):
        with pytest.raises(UserError, match=says):
            data.check(**{"vocab_size": 10, "classes": 8, "seq_len": 3, **bounds})
