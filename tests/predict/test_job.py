"""The command: every answer in a file, continued to the bit where it was cut."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

import pytest

from protomamba.bits import same
from protomamba.cli.main import main
from protomamba.predict import batching, job
from protomamba.predict.predictor import Predictor
from tests.predict.models import model, saved, sequences

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "v0_1"


@pytest.fixture(autouse=True)
def small_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batching, "WINDOW_ROWS", 16)
    monkeypatch.setattr(batching, "BATCH_STEPS", 120)


def events(path: Path, count: int = 50) -> Path:
    lines = [json.dumps({"user": f"u{i}", "items": row}) for i, row in enumerate(sequences(count))]
    path.write_text("\n".join(lines) + "\n")
    return path


def predict(*arguments: object) -> int:
    return main(["predict", *map(str, arguments)])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_events_get_items_under_their_own_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = events(tmp_path / "in.jsonl"), tmp_path / "out.jsonl"
    assert predict(saved(tmp_path), source, "--out", out, "--top-k", 3, "--exclude-seen") == 0
    found = lines(out)
    assert [line["user"] for line in found] == [f"u{i}" for i in range(50)]
    wanted = list(Predictor(model()).next_items(sequences(50), 3, exclude_seen=True))
    assert [line["items"] for line in found] == [best.tokens for best in wanted]
    assert all(line["scores"] == pytest.approx(best.scores, rel=1e-5) for line, best in zip(found, wanted, strict=True))
    assert "50 rows (items)" in capsys.readouterr().out


def test_labels_get_a_class_and_probabilities(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("1 2 3\n4 5\n")
    assert predict(FIXTURES / "labels" / "latest.safetensors", tmp_path / "in.txt", "--out", tmp_path / "o.csv") == 0
    header, *rows = csv.reader((tmp_path / "o.csv").read_text().splitlines())
    assert header == ["row", "class", "probability", "probability_0", "probability_1", "probability_2"]
    for row in rows:
        chances = [float(cell) for cell in row[3:]]
        assert sum(chances) == pytest.approx(1, abs=1e-5) and chances[int(row[1])] == max(chances) == float(row[2])


def test_text_gets_its_likelihood_in_nats_bits_and_bits_per_byte(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("naïve\nx\n")
    assert (
        predict(saved(tmp_path, tokenizer=True), tmp_path / "in.txt", "--out", tmp_path / "o.jsonl", "--per-token") == 0
    )
    first, second = lines(tmp_path / "o.jsonl")
    assert (first["row"], first["tokens"], second["tokens"]) == (1, 6, 1)
    assert first["bits"] == pytest.approx(-first["log_likelihood"] / math.log(2))
    assert first["bits_per_byte"] == pytest.approx(first["bits"] / 6, rel=1e-5)
    assert sum(first["token_log_likelihoods"]) == pytest.approx(first["log_likelihood"], rel=1e-4)
    (own,) = Predictor(model(vocab_size=257)).log_likelihoods([[256, *"naïve".encode()]])
    assert own.log_likelihood == pytest.approx(first["log_likelihood"], rel=1e-6)


def test_embeddings_keep_every_bit_of_a_float(tmp_path: Path) -> None:
    source = events(tmp_path / "in.jsonl", 5)
    assert predict(saved(tmp_path), source, "--out", tmp_path / "o.jsonl", "--what", "embedding") == 0
    wanted = [vector.astype(float).tolist() for vector in Predictor(model()).embeddings(sequences(5))]
    found = [
        [float(__import__("numpy").float32(value)) for value in line["embedding"]]
        for line in lines(tmp_path / "o.jsonl")
    ]
    assert same(found, wanted)


@pytest.mark.parametrize("suffix", ["jsonl", "csv"])
def test_a_cut_output_goes_on_to_the_same_bytes(tmp_path: Path, suffix: str) -> None:
    checkpoint, source = saved(tmp_path), events(tmp_path / "in.jsonl")
    whole, cut = tmp_path / f"whole.{suffix}", tmp_path / f"cut.{suffix}"
    assert predict(checkpoint, source, "--out", whole) == 0
    content = whole.read_bytes()
    places = [0, 3, len(content) // 3, len(content) - 1, len(content)]
    places += [place + 1 for place in range(len(content)) if content[place : place + 1] == b"\n"][::7]
    for place in places:
        cut.write_bytes(content[:place])
        assert predict(checkpoint, source, "--out", cut) == 0
        assert cut.read_bytes() == content, place


def test_going_on_works_on_no_more_than_a_window_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint, source, out = saved(tmp_path), events(tmp_path / "in.jsonl"), tmp_path / "o.jsonl"
    assert predict(checkpoint, source, "--out", out) == 0
    out.write_bytes(b"".join(out.read_bytes().splitlines(keepends=True)[:40]))
    worked: list[int] = []
    real = job.answers

    def counted(predictor: Any, window: Any, *rest: Any) -> Any:
        worked.append(len(window))
        return real(predictor, window, *rest)

    monkeypatch.setattr(job, "answers", counted)
    assert predict(checkpoint, source, "--out", out) == 0
    assert worked == [16, 2]  # rows 33 to 48, of which 8 were there, and the last two


def test_rows_that_are_skipped_are_counted_and_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, source, out = saved(tmp_path), events(tmp_path / "in.jsonl", 40), tmp_path / "o.jsonl"
    rows = source.read_text().splitlines()
    rows[5], rows[20] = '{"user": "bad", "items": [77]}', "{"
    source.write_text("\n".join(rows))
    assert predict(checkpoint, source, "--out", out) == 1
    error = capsys.readouterr().err
    assert (
        f"{source}, row 6, column 'items': token 77 at place 1: expected 0 to 39; correct it, or use --on-bad-row skip"
        in error
    )
    assert predict(checkpoint, source, "--out", out, "--on-bad-row", "skip") == 0
    assert "2 rows skipped" in capsys.readouterr().err
    assert [each["row"] for each in lines(tmp_path / "o.jsonl.skipped.jsonl")] == [6, 21]
    whole = out.read_bytes()
    assert len(lines(out)) == 38
    out.write_bytes(whole[: len(whole) // 2])
    assert predict(checkpoint, source, "--out", out, "--on-bad-row", "skip", "--json") == 0
    told = json.loads(capsys.readouterr().out)
    assert out.read_bytes() == whole and told["rows"] == 38 and len(told["skipped"]) == 2 and told["found"] > 10


def test_an_output_of_something_else_is_not_mixed_with(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    checkpoint, source, out = saved(tmp_path), events(tmp_path / "in.jsonl"), tmp_path / "o.jsonl"
    assert predict(checkpoint, source, "--out", out, "--top-k", 3) == 0
    before = out.read_bytes()
    assert predict(checkpoint, source, "--out", out, "--top-k", 4) == 1
    assert "is not what this command writes there" in capsys.readouterr().err
    assert predict(checkpoint, events(tmp_path / "short.jsonl", 20), "--out", out, "--top-k", 3) == 1
    assert "holds 50 lines, the input 20 rows" in capsys.readouterr().err
    assert out.read_bytes() == before
    assert predict(checkpoint, source, "--out", tmp_path / "o.csv") == 0
    assert predict(checkpoint, source, "--out", tmp_path / "o.csv", "--what", "embedding") == 1
    assert "has other columns" in capsys.readouterr().err


def test_parquet_is_gathered_and_written_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    checkpoint, source, out = saved(tmp_path), events(tmp_path / "in.jsonl"), tmp_path / "o.parquet"
    assert predict(checkpoint, source, "--out", tmp_path / "o.jsonl") == 0
    gathered = tmp_path / "o.parquet.part.jsonl"
    gathered.write_bytes((tmp_path / "o.jsonl").read_bytes()[:500])
    assert predict(checkpoint, source, "--out", out) == 0
    assert parquet.read_table(out).to_pylist() == lines(tmp_path / "o.jsonl") and not gathered.exists()
    assert predict(checkpoint, source, "--out", out) == 1
    assert "already exists and is complete" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--what", "class"), "the model predicts the next token"),
        (("--top-k", 0), "--top-k 0: expected an integer >= 1"),
        (("--what", "embedding", "--top-k", 3), "--top-k: does not apply to --what embedding"),
        (("--what", "likelihood", "--exclude-seen"), "--exclude-seen: does not apply to --what likelihood"),
        (("--per-token",), "--per-token: does not apply to --what items"),
        (("--out", "o.txt"), "expected a name ending in .jsonl, .csv or .parquet"),
        (("--key-column", "scores"), "--key-column scores: there is no such column"),
        (("--layer", "compact"), "--layer compact: the checkpoint's layer is mamba"),
    ],
)
def test_what_cannot_be_asked_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: tuple[object, ...], words: str
) -> None:
    assert predict(saved(tmp_path), events(tmp_path / "in.jsonl", 3), "--out", tmp_path / "o.jsonl", *options) in (1, 2)
    assert words in capsys.readouterr().err


def test_one_writer_at_a_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from protomamba.predict.output import Lines

    with Lines(tmp_path / "o.jsonl"):
        assert predict(saved(tmp_path), events(tmp_path / "in.jsonl", 3), "--out", tmp_path / "o.jsonl") == 1
    assert "another process is writing it" in capsys.readouterr().err


def test_names_that_are_no_unicode_read_back_the_same(tmp_path: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_bytes(b'id,items\nna\xc3\xafve,1\n\xff,2\n"two\nlines",3\n')
    assert predict(saved(tmp_path), source, "--out", tmp_path / "o.jsonl") == 0
    assert [line["id"] for line in lines(tmp_path / "o.jsonl")] == ["naïve", "\udcff", "two\nlines"]
    assert predict(saved(tmp_path), source, "--out", tmp_path / "o.csv") == 1
