"""predict after prepare and train: tables of events and FASTA files, read as they were for training."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from protomamba import Predictor
from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main
from protomamba.data.dna import DnaTokenizer
from protomamba.data.vocabulary import Vocabulary

pytest.importorskip("pyarrow")
TINY = [
    "--d-model",
    "8",
    "--d-state",
    "4",
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--seq-len",
    "16",
    "--threads",
    "1",
    "--progress",
    "0",
    "--write-report",
    "0",
]


def run(*arguments: object) -> int:
    return main([str(part) for part in arguments])


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def sequences() -> dict[str, list[str]]:
    """Items of each user in order, each at least three of twelve."""
    drawn = random.Random(1)
    return {f"u{i}": [f"sku-{drawn.randrange(12)}" for _ in range(drawn.randint(3, 9))] for i in range(30)}


def table(path: Path, users: dict[str, list[str]]) -> Path:
    """One event a row, those of all users mixed, so that only the time orders them."""
    rows = [
        (user, 100 * place + int(user[1:]), item) for user, items in users.items() for place, item in enumerate(items)
    ]
    random.Random(2).shuffle(rows)
    path.write_text("user,time,item\n" + "".join(f"{user},{time},{item}\n" for user, time, item in rows))
    return path


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a table, the folder prepared from it, and a run."""
    folder = tmp_path_factory.mktemp("events")
    source = table(folder / "events.csv", sequences())
    columns = ("--group", "user", "--order", "time", "--item", "item")
    assert run("prepare", "events", source, "--out-dir", folder / "data", *columns) == 0
    assert run("train", folder / "data", "--out-dir", folder / "run", *TINY) == 0
    return folder


def model_of(folder: Path) -> tuple[Predictor, Vocabulary]:
    path = folder / "run" / "latest.safetensors"
    loaded = checkpoint.load(path)
    vocabulary = Vocabulary.from_state(loaded.parts["vocabulary"])
    return Predictor.from_checkpoint(path, loaded.config["data"]["reserved"]), vocabulary


def test_a_table_gives_a_line_for_each_user_with_items_by_name(events: Path, tmp_path: Path) -> None:
    out = tmp_path / "o.jsonl"
    options = ("--out", out, "--top-k", 5, "--exclude-seen")
    assert run("predict", events / "run" / "latest.safetensors", events / "events.csv", *options) == 0
    found = {line["user"]: line for line in lines(out)}
    users = sequences()
    assert found.keys() == users.keys() and len(lines(out)) == len(users)
    predictor, vocabulary = model_of(events)
    for user, items in users.items():
        tokens = np.concatenate(([0], vocabulary.encode(items)))
        (best,) = predictor.next_items([tokens], 5, exclude_seen=True)
        assert found[user]["items"] == [vocabulary.name(token) for token in best.tokens]
        assert found[user]["scores"] == pytest.approx(best.scores, rel=1e-4)
        assert not set(items) & set(found[user]["items"])


def test_lists_of_names_answer_the_same_as_the_table(events: Path, tmp_path: Path) -> None:
    model = events / "run" / "latest.safetensors"
    rows = [{"user": user, "items": items} for user, items in sequences().items()]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run("predict", model, tmp_path / "in.jsonl", "--out", tmp_path / "lists.jsonl") == 0
    assert run("predict", model, events / "events.csv", "--out", tmp_path / "table.jsonl") == 0
    by_table = {line["user"]: line for line in lines(tmp_path / "table.jsonl")}
    for line in lines(tmp_path / "lists.jsonl"):
        assert line["items"] == by_table[line["user"]]["items"]
        assert line["scores"] == pytest.approx(by_table[line["user"]]["scores"], rel=1e-4)


def test_a_cut_output_of_a_table_goes_on(events: Path, tmp_path: Path) -> None:
    command = ("predict", events / "run" / "latest.safetensors", events / "events.csv", "--out", tmp_path / "o.csv")
    assert run(*command) == 0
    whole = (tmp_path / "o.csv").read_bytes()
    (tmp_path / "o.csv").write_bytes(whole[: len(whole) // 2])
    assert run(*command) == 0 and (tmp_path / "o.csv").read_bytes() == whole
    assert [path.name for path in tmp_path.iterdir()] == ["o.csv"]


def test_other_columns_and_unknown_items(events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "in.csv").write_text("who,what,when\na,sku-1,2\na,never,1\nb,sku-2,1\n")
    command = ("predict", events / "run" / "latest.safetensors", tmp_path / "in.csv", "--out", tmp_path / "o.jsonl")
    assert run(*command, "--group", "who", "--item", "what", "--order", "when", "--json") == 0
    assert json.loads(capsys.readouterr().out)["unknown"] == 1
    found = {line["who"]: line["items"] for line in lines(tmp_path / "o.jsonl")}
    predictor, vocabulary = model_of(events)
    (best,) = predictor.next_items([[0, 1, *vocabulary.encode(["sku-1"]).tolist()]])
    assert found["a"] == [vocabulary.name(token) for token in best.tokens] and set(found) == {"a", "b"}


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        ("user,time,item\na,1,sku-1\na,,sku-2\n", (), "row 2, column 'time'"),
        ("user,time,item\na,1,sku-1\n,2,sku-2\n", (), "row 2, column 'user'"),
        ("user,item\na,sku-1\n", (), "time"),
        ("user,time,item\na,1,sku-1\n", ("--group", "who"), "who"),
    ],
)
def test_a_bad_table_is_refused_by_row_and_column(
    events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, options: tuple[str, ...], words: str
) -> None:
    (tmp_path / "in.csv").write_text(text)
    command = ("predict", events / "run" / "latest.safetensors", tmp_path / "in.csv", "--out", tmp_path / "o.jsonl")
    assert run(*command, *options) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize("kmer", [1, 2])
def test_dna_gets_the_likelihood_of_each_record(tmp_path: Path, kmer: int) -> None:
    drawn = random.Random(3)
    records = {f"c{i}": "".join(drawn.choice("ACGTacgtN") for _ in range(40 + 10 * i)) for i in range(25)}
    source = tmp_path / "in.fa"
    source.write_text("".join(f">{name} about\n{bases[:30]}\n{bases[30:]}\n" for name, bases in records.items()))
    assert run("prepare", "fasta", source, "--out-dir", tmp_path / "data", "--kmer", kmer) == 0
    assert run("train", tmp_path / "data", "--out-dir", tmp_path / "run", *TINY) == 0
    model, out = tmp_path / "run" / "latest.safetensors", tmp_path / "o.jsonl"
    assert run("predict", model, source, "--out", out, "--per-token") == 0
    predictor = Predictor.from_checkpoint(model)
    for line, (name, bases) in zip(lines(out), records.items(), strict=True):
        tokens = [0, *DnaTokenizer(kmer).encode(bases)]
        (own,) = predictor.log_likelihoods([tokens], per_token=True)
        assert own.tokens is not None
        judged = [value for value, token in zip(own.tokens, tokens[1:], strict=True) if token != 1]
        assert line["id"] == name and line["tokens"] == len(judged)
        assert line["log_likelihood"] == pytest.approx(sum(filter(None, judged)), rel=1e-4)
        assert line["bits_per_byte"] == pytest.approx(-line["log_likelihood"] / math.log(2) / len(bases), rel=1e-4)
        unknown = [value is None for value in line["token_log_likelihoods"]]
        assert unknown == [token == 1 for token in tokens[1:]]


def test_the_names_are_tensors_of_the_checkpoint_and_survive_a_resume(events: Path, tmp_path: Path) -> None:
    loaded = checkpoint.load(events / "run" / "latest.safetensors")
    assert all(isinstance(value, torch.Tensor) for value in loaded.parts["vocabulary"].values())
    assert loaded.config["data"]["recipe"] == {"kind": "events", "group": "user", "item": "item", "order": "time"}
    resume = ("--resume", events / "run" / "latest.safetensors", "--steps", 2, "--out-dir", tmp_path / "more")
    assert run("train", *resume, *TINY[-4:]) == 0
    more = checkpoint.load(tmp_path / "more" / "latest.safetensors")
    assert Vocabulary.from_state(more.parts["vocabulary"]).identity == model_of(events)[1].identity


def labelled(path: Path, rows: list[str], header: str) -> Path:
    path.write_text(header + "\n" + "\n".join(rows) + "\n")
    return path


def train_labels(folder: Path, source: Path, *columns: object, channels: int = 0) -> Path:
    assert run("prepare", "labels", source, "--out-dir", folder / "data", *columns) == 0
    vector = ("--input", "vector", "--input-option", f"channels={channels}") if channels else ()
    assert run("train", folder / "data", "--out-dir", folder / "run", *TINY, *vector) == 0
    return folder / "run" / "latest.safetensors"


def test_labelled_texts_get_the_names_of_their_classes(tmp_path: Path) -> None:
    texts = [f"{'good' if i % 2 else 'bad'} thing {i}" for i in range(20)]
    rows = [f"{'ham' if i % 2 else 'spam'},m{i},{text}" for i, text in enumerate(texts)]
    source = labelled(tmp_path / "mail.csv", rows, "kind,id,body")
    model = train_labels(tmp_path, source, "--label", "kind", "--text", "body")
    assert run("predict", model, source, "--out", tmp_path / "o.jsonl") == 0
    own = Predictor.from_checkpoint(model).class_probabilities([list(text.encode()) for text in texts])
    for i, (line, chances) in enumerate(zip(lines(tmp_path / "o.jsonl"), own, strict=True)):
        assert line["id"] == f"m{i}" and set(line["probabilities"]) == {"ham", "spam"}
        assert list(line["probabilities"].values()) == pytest.approx(chances.tolist(), rel=1e-4)
        assert line["class"] == ["ham", "spam"][int(chances.argmax())]


def test_labelled_tokens_are_read_by_their_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{'up' if i % 2 else 'down'},a{i % 3} b{i % 2} a1,r{i}" for i in range(20)]
    source = labelled(tmp_path / "in.csv", rows, "y,steps,id")
    model = train_labels(tmp_path, source, "--label", "y", "--tokens", "steps")
    labelled(tmp_path / "new.csv", ["q,a1 b0 zz"], "id,steps")
    assert run("predict", model, tmp_path / "new.csv", "--out", tmp_path / "o.jsonl") == 0
    assert "1 items are unknown" in capsys.readouterr().err
    (line,) = lines(tmp_path / "o.jsonl")
    vocabulary = Vocabulary.from_state(checkpoint.load(model).parts["vocabulary"])
    (own,) = Predictor.from_checkpoint(model).class_probabilities([[*vocabulary.encode(["a1", "b0"]).tolist(), 1]])
    assert line["id"] == "q" and line["probabilities"]["down"] == pytest.approx(float(own[0]), rel=1e-4)


def test_labelled_values_are_scaled_as_in_training(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [f"{i % 2},{i},{i % 2 + 5},{'' if i == 3 else i}" for i in range(20)]
    source = labelled(tmp_path / "in.csv", rows, "y,v1,v2,v3")
    model = train_labels(tmp_path, source, "--label", "y", "--values", "v*", channels=1)
    assert run("predict", model, source, "--out", tmp_path / "o.jsonl") == 0
    recipe = checkpoint.load(model).config["data"]["recipe"]
    (mean,), (std,) = recipe["mean"], recipe["std"]
    steps = [[i, i % 2 + 5, i] for i in range(20)]
    arrays = [((np.array(each)[:, None] - mean) / std).astype(np.float32) for each in steps]
    arrays[3] = arrays[3][:2]  # nothing is known at its end
    own = list(Predictor.from_checkpoint(model).class_probabilities(arrays))
    for line, chances in zip(lines(tmp_path / "o.jsonl"), own, strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(chances.tolist(), rel=1e-4)
    labelled(tmp_path / "bad.csv", ["1,2,3", "1,x,3"], "v1,v2,v3")
    assert run("predict", model, tmp_path / "bad.csv", "--out", tmp_path / "b.jsonl") == 1
    assert "row 2: column v2: expected a number, found 'x'" in capsys.readouterr().err


def test_series_of_ts_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "@problemName p\n@timeStamps false\n@classLabel true a b\n@data\n"
    cases = [f"{i},{i % 2},3:{i % 2 + 1},?:{'ab'[i % 2]}" for i in range(20)]
    (tmp_path / "in.ts").write_text(head + "\n".join(cases) + "\n")
    model = train_labels(tmp_path, tmp_path / "in.ts", channels=2)
    assert run("predict", model, tmp_path / "in.ts", "--out", tmp_path / "o.csv") == 0
    assert (tmp_path / "o.csv").read_text().startswith("row,class,probability,probability_a,probability_b\n5,")
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 21
    labelled(tmp_path / "wide.csv", ["1"], "v1")
    assert run("predict", model, tmp_path / "wide.csv", "--out", tmp_path / "w.jsonl") == 1
    assert "takes its series as .ts or .npz" in capsys.readouterr().err
    (tmp_path / "one.ts").write_text(head + "1,2:a\n")
    assert run("predict", model, tmp_path / "one.ts", "--out", tmp_path / "n.jsonl") == 1
    assert "expected 2 channels of values, found 1 channels" in capsys.readouterr().err
