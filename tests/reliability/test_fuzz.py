"""A sample of `make fuzz`: hostile variants of every kind of file, and each one that has failed before."""

from __future__ import annotations

import gzip
import io
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protomamba.data.csv_tables import _last_end
from protomamba.errors import UserError
from tests.reliability.fuzz import mutate
from tests.reliability.fuzz.__main__ import run
from tests.reliability.fuzz.harness import CORPUS, fuzz, good_input, peak_bytes, problem_with
from tests.reliability.fuzz.readers import READERS, Reader
from tests.reliability.promises import Trials

OURS = [name for name, reader in READERS.items() if not reader.foreign]


def needed(name: str) -> None:
    if READERS[name].foreign or name == "events manifest":  # its good folder is made by pyarrow
        pytest.importorskip("tokenizers" if name == "tokenizer" else "pyarrow")


@pytest.mark.parametrize("name", OURS)
def test_hostile_variants_are_read_or_refused_in_one_line(name: str, trials: Callable[[int], Trials]) -> None:
    needed(name)
    counted, count = trials(13), 20
    for seed, found in fuzz(name, first=random.Random(name).randrange(10**6), count=count):
        counted.add(f"{name}, seed {seed}: {found}" if found else None, count=0 if found else 1)
    counted.finish()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name, reader in READERS.items() if reader.foreign])
def test_hostile_variants_for_parsers_of_others(name: str, trials: Callable[[int], Trials]) -> None:
    needed(name)
    counted, count = trials(13), 500
    failures = run(name, count, first=10**6)
    counted.add(None, count=count - len(failures))
    for seed, found in failures.items():
        counted.add(f"{name}, seed {seed}: {found}")
    counted.finish()


@pytest.mark.parametrize("path", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_failed_before(path: Path, trials: Callable[[int], Trials]) -> None:
    counted, name = trials(13), path.parent.name.replace("-", " ")
    needed(name)
    with good_input(READERS[name]) as (place, _):
        counted.add(problem_with(READERS[name], place, path.read_bytes(), peak_bytes()))
    counted.finish()


def _bomb(folder: Path) -> Path:
    """A .npz of a few megabytes that says it unpacks to 8 GiB of zeros: its account alone, no such bytes."""
    file = io.BytesIO()
    np.savez_compressed(file, X=np.zeros((2, 2)), y=np.zeros(2))
    data, claimed = file.getvalue(), (8 << 30) % 2**32 or 0xFFFFFFFE
    at = data.index(b"PK\x01\x02")
    (folder / "t.npz").write_bytes(data[: at + 24] + claimed.to_bytes(4, "little") + data[at + 28 :])
    return folder / "t.npz"


def test_an_archive_that_unpacks_to_more_than_it_may_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"t\.npz: not a readable \.npz file: .* would unpack to 4,294,967"):
        READERS["labels npz"].read(_bomb(tmp_path))


@pytest.mark.parametrize("name", ["labels ts gz", "rows txt", "fasta", "events csv", "jsonl gz"])
def test_a_line_without_an_end_is_refused(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What has to be in memory at once is bounded: a kilobyte of gzip may unpack to a line of any length."""
    needed(name)
    for module in ("compressed", "csv_tables", "fasta"):
        monkeypatch.setattr(f"protomamba.data.{module}.LONGEST_LINE", 1_000)
    monkeypatch.setattr("protomamba.data.csv_tables.BLOCK_BYTES", 600)
    with good_input(READERS[name]) as (path, good):
        unpacked = gzip.decompress(good) if path.suffix == ".gz" else good
        endless = unpacked.rstrip(b"\n") + b"\n>" + b" " * 3_000
        path.write_bytes(gzip.compress(endless) if path.suffix == ".gz" else endless)
        with pytest.raises(UserError, match="expected at most 1,000 bytes in a line"):
            READERS[name].read(path)


def test_quotes_without_an_end_cost_no_more_than_their_length() -> None:
    """Each line end was tried with a count of all quotes before it: a day for a block of 16 MB."""
    text = b'"' + b"\n" * 200_000 + b'"a"\n' * 100_000
    assert _last_end(text) == 0 and _last_end(b'a\n"b\n"\nc') == len(b'a\n"b\n"\n')


def _panics(path: Path) -> None:
    raise BaseException("a panic of a foreign parser is no Exception")


def _spins(path: Path) -> None:
    while True:
        pass


class _TwoLines(UserError):
    def __str__(self) -> str:
        return "two\nlines"


def _talks(path: Path) -> None:
    raise _TwoLines("what a UserError itself no longer does")


def test_a_message_stays_one_line_whatever_it_quotes() -> None:
    """A key of two line ends, escapes for the terminal; lists of our own are indented, and stay lists."""
    assert str(UserError("found \n\n, \x1b[2J, \u202e")) == r"found \n\n, \x1b[2J, \u202e"
    assert str(UserError("wrong:\n  a\n  b é ☃")) == "wrong:\n  a\n  b é ☃"


@pytest.mark.parametrize(
    ("read", "says"),
    [(_panics, "BaseException"), (_spins, "processor"), (_talks, "several")],
)
def test_the_judge_sees_what_it_is_there_for(
    read: Callable[[Path], None], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.reliability.fuzz.harness.SECONDS", 0.2)
    reader = Reader(lambda folder: folder / "x", read, mutate.any_bytes)
    found = problem_with(reader, tmp_path / "x", b"data", peak_bytes())
    assert found is not None and says in found


def test_the_judge_sees_memory(tmp_path: Path) -> None:
    reader = Reader(lambda folder: folder / "x", lambda path: None, mutate.any_bytes)
    assert problem_with(reader, tmp_path / "x", b"data", peak_bytes()) is None
    found = problem_with(reader, tmp_path / "x", b"data", peak_bytes() - (201 << 20))
    assert found is not None and "memory grew by" in found


@pytest.mark.parametrize("change", [mutate.any_bytes, mutate.any_json, mutate.json_lines, mutate.npy_header])
def test_mutations_repeat_by_their_seed_and_seldom_do_nothing(change: mutate.Mutator) -> None:
    good = b'{"a": [1, 2, {"b": "text"}], "c": "{}", "d": 1.5}\n{"e": null}'
    if change is mutate.npy_header:
        file = io.BytesIO()
        np.save(file, np.arange(9))
        good = file.getvalue()
    made = [change(good, random.Random(seed)) for seed in range(300)]
    assert made == [change(good, random.Random(seed)) for seed in range(300)]
    assert sum(each == good for each in made) < 15 and len(set(made)) > 50
