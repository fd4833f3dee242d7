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
from protomamba.data.tokenizer import tokenizer_from_json
from protomamba.data.vocabulary import Vocabulary
from protomamba.run_config import RunConfig
from protomamba.train.build import build_parts

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


def test_a_table_without_the_items_is_refused(events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its first other column was read as items, all of them unknown."""
    model = events / "run" / "latest.safetensors"
    (tmp_path / "mail.csv").write_text("label,text\na,hello\n")
    assert run("predict", model, tmp_path / "mail.csv", "--out", tmp_path / "out.jsonl") == 1
    assert "mail.csv: no column 'item', the items of the table" in (error := capsys.readouterr().err)
    assert "its columns are label, text; name others with --group and --item" in error and error.count("\n") == 1


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
        assert line["bits_per_base"] == pytest.approx(-line["log_likelihood"] / math.log(2) / len(bases), rel=1e-4)
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
    assert "read as unknown: 1 item not in the model's vocabulary" in capsys.readouterr().err
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
    assert "row 2, column 'v2': expected a number, found 'x'" in capsys.readouterr().err


def test_series_of_ts_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    head = "@problemName p\n@timeStamps false\n@classLabel true a b\n@data\n"
    cases = [f"{i},{i % 2},3:{i % 2 + 1},?:{'ab'[i % 2]}" for i in range(20)]
    (tmp_path / "in.ts").write_text(head + "\n".join(cases) + "\n")
    model = train_labels(tmp_path, tmp_path / "in.ts", channels=2)
    assert run("predict", model, tmp_path / "in.ts", "--out", tmp_path / "o.csv") == 0
    assert (tmp_path / "o.csv").read_text().startswith("row,class,probability,probability_a,probability_b\n1,")
    assert len((tmp_path / "o.csv").read_text().splitlines()) == 21
    labelled(tmp_path / "wide.csv", ["1"], "v1")
    assert run("predict", model, tmp_path / "wide.csv", "--out", tmp_path / "w.jsonl") == 1
    assert "of a table name the columns: --values" in capsys.readouterr().err
    rows = [f"g,{2 - i},{i},{i * i}" for i in range(3)] + ["h,1,4,"]
    long = labelled(tmp_path / "long.csv", rows, "g,t,a,b")
    named = ("--group", "g", "--order", "t", "--values", "a,b")
    assert run("predict", model, long, "--out", tmp_path / "long.jsonl", *named) == 0
    recipe = checkpoint.load(model).config["data"]["recipe"]
    steps = [np.array([[2, 4], [1, 1], [0, 0]]), np.array([[4, np.nan]])]
    arrays = [((each - recipe["mean"]) / recipe["std"]).astype(np.float32) for each in steps]
    own = list(Predictor.from_checkpoint(model).class_probabilities(arrays))
    for line, chances in zip(lines(tmp_path / "long.jsonl"), own, strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(chances.tolist(), rel=1e-4)
    (tmp_path / "one.ts").write_text(head + "1,2:a\n")
    assert run("predict", model, tmp_path / "one.ts", "--out", tmp_path / "n.jsonl") == 1
    assert "expected 2 channels of values, found 1 channels" in capsys.readouterr().err


def test_a_row_a_step_gives_a_line_a_group_scaled_as_in_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn, steps = random.Random(4), dict[str, list[tuple[float, float]]]()
    for i in range(16):
        steps[f"s{i}"] = [(drawn.gauss(50, 9), drawn.gauss(-3, 0.1)) for _ in range(2 + i % 4)]
    rows = [
        f"{g},{place},{a:.4f},{b:.4f},{'xy'[int(g[1:]) % 2]}"
        for g, each in steps.items()
        for place, (a, b) in enumerate(each)
    ]
    random.Random(5).shuffle(rows)
    source = labelled(tmp_path / "in.csv", rows, "who,at,left,right,kind")
    columns = ("--label", "kind", "--values", "left,right", "--group", "who", "--order", "at")
    model = train_labels(tmp_path, source, *columns)
    bare = [row.rpartition(",")[0].replace(",", "\t") for row in rows]  # without the label, as new data is
    labelled(tmp_path / "new.tsv", bare, "name\tat\tleft\tright")
    assert run("predict", model, tmp_path / "new.tsv", "--out", tmp_path / "o.jsonl", "--group", "name") == 0
    recipe = checkpoint.load(model).config["data"]["recipe"]
    found = {line["name"]: line["probabilities"] for line in lines(tmp_path / "o.jsonl")}
    assert found.keys() == steps.keys()
    predictor = Predictor.from_checkpoint(model)
    for name, each in steps.items():
        rounded = np.array([[float(f"{value:.4f}") for value in step] for step in each], dtype=np.float32)
        (own,) = predictor.class_probabilities([((rounded - recipe["mean"]) / recipe["std"]).astype(np.float32)])
        assert list(found[name].values()) == pytest.approx(own.tolist(), rel=1e-4)
    labelled(tmp_path / "bad.csv", ["a,1,1,2", "a,2,x,2", "b,1,1,2", "c,,1,2"], "who,at,left,right")
    assert run("predict", model, tmp_path / "bad.csv", "--out", tmp_path / "b.jsonl") == 1
    assert "row 4, column 'at': expected a number as in the rows before, found nothing" in capsys.readouterr().err
    assert run("predict", model, tmp_path / "bad.csv", "--out", tmp_path / "b.jsonl", "--on-bad-row", "skip") == 0
    assert [line["who"] for line in lines(tmp_path / "b.jsonl")] == ["b"]
    skipped = lines(tmp_path / "b.jsonl.skipped.jsonl")
    assert [line["row"] for line in skipped] == [2, 4]
    assert "all of 'a' is left out" in skipped[0]["reason"] and "2 rows skipped" in capsys.readouterr().err


def test_a_row_a_token_gives_a_line_a_group(tmp_path: Path) -> None:
    rows = [f"g{i % 16},{i},{'ab'[i % 16 % 2]}{i % 3},{'yn'[i % 16 % 2]}" for i in range(80)]
    source = labelled(tmp_path / "in.csv", rows, "g,t,word,y")
    model = train_labels(tmp_path, source, "--label", "y", "--tokens", "word", "--group", "g", "--order", "t")
    assert run("predict", model, source, "--out", tmp_path / "o.jsonl") == 0
    lists = [json.dumps({"g": f"g{g}", "word": [f"{'ab'[g % 2]}{i % 3}" for i in range(g, 80, 16)]}) for g in range(16)]
    (tmp_path / "lists.jsonl").write_text("\n".join(lists) + "\n")
    assert run("predict", model, tmp_path / "lists.jsonl", "--out", tmp_path / "l.jsonl") == 0
    by_step = {line["g"]: line["probabilities"] for line in lines(tmp_path / "o.jsonl")}
    assert len(by_step) == 16
    for line in lines(tmp_path / "l.jsonl"):
        assert line["probabilities"] == pytest.approx(by_step[line["g"]], rel=1e-4)


BAD_EVENTS = {
    "csv": "user,time,item\na,1,sku-1\n,2,sku-2\na,soon,sku-3\na,3\nb,4,sku-1\nb,5,\na,6,sku-2,9\na,7,sku-4\n",
    "jsonl": '{"user":"a","time":1,"item":"sku-1"}\n{"user":null,"time":2,"item":"sku-2"}\n'
    '{"user":"a","time":"soon","item":"sku-3"}\nno json\n{"user":"b","time":4,"item":"sku-1"}\n'
    '{"user":"b","time":5,"item":""}\n[]\n{"user":"a","time":7,"item":"sku-4"}\n',
}


@pytest.mark.parametrize("kind", BAD_EVENTS)
def test_bad_events_are_left_out_and_listed(
    events: Path, tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / f"in.{kind}").write_text(BAD_EVENTS[kind])
    command = ("predict", events / "run" / "latest.safetensors", tmp_path / f"in.{kind}", "--out", tmp_path / "o.jsonl")
    assert run(*command) == 1
    assert "row " in capsys.readouterr().err
    assert run(*command, "--on-bad-row", "skip", "--json") == 0
    told = {each["row"]: each["reason"] for each in json.loads(capsys.readouterr().out)["skipped"]}
    assert told.keys() == {2, 3, 4, 6, 7}
    assert told == {each["row"]: each["reason"] for each in lines(tmp_path / "o.jsonl.skipped.jsonl")}
    assert told[3].startswith("column 'time': expected a ") and "as in the rows before, found 'soon'" in told[3]
    good = [("a", 1, "sku-1"), ("b", 4, "sku-1"), ("a", 7, "sku-4")]
    (tmp_path / "good.csv").write_text("user,time,item\n" + "".join(f"{u},{t},{i}\n" for u, t, i in good))
    assert run(*command[:2], tmp_path / "good.csv", "--out", tmp_path / "g.jsonl") == 0
    assert lines(tmp_path / "o.jsonl") == lines(tmp_path / "g.jsonl")


def test_labelled_texts_by_a_tokenizer_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = [f"{'good' if i % 2 else 'bad'} thing {i}" for i in range(20)]
    source = labelled(tmp_path / "mail.csv", [f"{i % 2},{text}" for i, text in enumerate(texts)], "kind,body")
    model = train_labels(tmp_path, source, "--label", "kind", "--text", "body", "--train-bpe", 280)
    assert run("predict", model, source, "--out", tmp_path / "o.jsonl") == 0
    tokenizer = tokenizer_from_json(checkpoint.load(model).config["tokenizer"])
    assert len(tokenizer.encode("good thing")) < 5
    own = Predictor.from_checkpoint(model).class_probabilities(map(tokenizer.encode, texts))
    for line, chances in zip(lines(tmp_path / "o.jsonl"), own, strict=True):
        assert list(line["probabilities"].values()) == pytest.approx(chances.tolist(), rel=1e-4)
    columns = ("--label", "kind", "--tokens", "body", "--train-bpe", 280)
    assert run("prepare", "labels", source, "--out-dir", tmp_path / "no", *columns) == 2
    assert "make tokens of --text COLUMN" in capsys.readouterr().err


def test_new_items_come_behind_and_old_rows_stay_theirs_to_the_bit(
    events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    later = {user: [*items[2:], f"new-{int(user[1:]) % 3}", items[0]] for user, items in sequences().items()}
    source = table(tmp_path / "later.csv", later)
    columns = ("--group", "user", "--order", "time", "--item", "item")
    assert run("prepare", "events", source, "--out-dir", tmp_path / "other", *columns) == 0
    first = ("--init-from", events / "run" / "latest.safetensors", *TINY[4:])
    assert run("train", tmp_path / "other", "--out-dir", tmp_path / "refused", *first) == 1
    assert f"prepare events --vocab-from {events / 'run'}" in capsys.readouterr().err
    more = ("--vocab-from", events / "run")
    assert run("prepare", "events", source, "--out-dir", tmp_path / "data", *columns, *more) == 0
    assert run("train", tmp_path / "data", "--out-dir", tmp_path / "run", *first) == 0
    assert "3 new items with fresh rows" in capsys.readouterr().out
    before, after = (checkpoint.load(folder / "run" / "latest.safetensors").parts for folder in (events, tmp_path))
    old, new = (Vocabulary.from_state(parts["vocabulary"]) for parts in (before, after))
    assert new.begins_with(old) and new.size == old.size + 3 and new.name(old.size) in {f"new-{i}" for i in range(3)}
    config = RunConfig(data=tmp_path / "data", init_from=events / "run", out_dir=tmp_path / "built")
    started = build_parts(config).trainer.model.state_dict()
    tables = [name for name, value in before["model"].items() if value.ndim and value.shape[0] == old.size]
    assert len(tables) >= 2
    for name, value in before["model"].items():
        grown = started[name]
        assert torch.equal(grown[: old.size] if name in tables else grown, value), name
    assert run("predict", tmp_path / "run" / "latest.safetensors", source, "--out", tmp_path / "o.jsonl") == 0
    offered = {item for line in lines(tmp_path / "o.jsonl") for item in line["items"]}
    assert "unknown" not in capsys.readouterr().err and offered & {f"new-{i}" for i in range(3)}
