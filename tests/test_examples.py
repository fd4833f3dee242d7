"""The examples do what they say, shortened where they train long; the studies' table and clock."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from protomamba.data.labels import IGNORED, open_labelled

ROOT = Path(__file__).parents[1]


@pytest.fixture
def digits() -> ModuleType:
    pytest.importorskip("sklearn", reason="needs the extra `examples`")
    return importlib.import_module("examples.digits")


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "studies"))
    monkeypatch.delitem(sys.modules, "common", raising=False)
    return importlib.import_module("common")


def test_no_digit_is_held_out_twice_or_trained_on_where_it_is_held_out(digits: ModuleType) -> None:
    _, labels_N = digits.read_digits()
    parts = digits.folds(labels_N, seed=1)
    assert torch.cat([held_out for _, held_out in parts]).sort().values.tolist() == list(range(len(labels_N)))
    for training, held_out in parts:
        assert not set(training.tolist()) & set(held_out.tolist())
        assert len(training) + len(held_out) == len(labels_N)


def test_noise_stays_in_range_and_leaves_the_image_alone(digits: ModuleType) -> None:
    values_NL, _ = digits.read_digits()
    before = values_NL.clone()
    seen_NL = digits.noisy(values_NL, torch.Generator().manual_seed(0))
    assert torch.equal(values_NL, before) and not torch.equal(seen_NL, before)
    assert int(seen_NL.min()) == 0 and int(seen_NL.max()) == 16
    white_share = float((seen_NL == 0).float().mean() - (before == 0).float().mean())
    assert white_share > 0.02, "pixels are dropped"


def test_an_image_is_shifted_by_a_pixel_at_most(digits: ModuleType) -> None:
    values_NL = torch.zeros(90, 64, dtype=torch.int64)
    values_NL[:, 3 * 8 + 4] = 9
    places = digits.shifted(values_NL, torch.Generator().manual_seed(0)).nonzero()[:, 1]
    assert set(places.tolist()) == {8 * row + column for row in (2, 3, 4) for column in (3, 4, 5)}
    edge_NL = torch.zeros(90, 64, dtype=torch.int64)
    edge_NL[:, 0] = 9
    found = digits.shifted(edge_NL, torch.Generator().manual_seed(0)).sum(1)
    assert set(found.tolist()) == {0, 9}, "what leaves on one side does not come back on the other"


def test_the_files_it_writes_are_read_as_what_it_trains_on(digits: ModuleType, tmp_path: Path) -> None:
    digits.write_files(tmp_path)
    found = open_labelled(tmp_path / "tokens.txt", tmp_path / "labels.txt")
    values_NL, labels_N = digits.read_digits()
    tokens_BL, labels_BL = map(torch.from_numpy, found.read(torch.arange(5).numpy()))
    assert torch.equal(tokens_BL, values_NL[:5]) and len(found) == len(labels_N)
    assert (labels_BL[:, : -digits.LABELLED] == IGNORED).all()
    assert torch.equal(labels_BL[:, -digits.LABELLED :], labels_N[:5, None].expand(5, digits.LABELLED))
    found.check(vocab_size=digits.SHAPE["vocab_size"], classes=10, seq_len=64)


def test_four_epochs_already_learn_digits(digits: ModuleType) -> None:
    assert digits.train_fold(0, seed=1, epochs=4) > 0.4


@pytest.mark.slow
def test_a_fold_reaches_what_is_promised(digits: ModuleType) -> None:
    assert digits.train_fold(0, seed=1) > 0.96


def test_a_study_s_table_replaces_only_its_own_place(common: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- a -->\nold\n<!-- end: a -->\nafter\n<!-- b -->\n<!-- end: b -->\n")
    common.write_between_marks(page, "a", "| new |")
    common.write_between_marks(page, "a", "| newer |")
    text = page.read_text()
    assert text.startswith("before\n<!-- a -->\n\n| newer |\n\n<!-- end: a -->\nafter\n") and "old" not in text
    with pytest.raises(SystemExit, match="expected the lines"):
        common.write_between_marks(page, "c", "")


def test_a_study_s_session_lays_its_schedule_over_the_steps_and_notes_the_start(
    common: ModuleType, tmp_path: Path
) -> None:
    (tmp_path / "corpus").mkdir()
    shape = {"d_model": 8, "d_state": 4, "base_layers": 1, "target_layers": 1, "batch_size": 2, "seq_len": 8}
    tokens = tmp_path / "tokens.txt"
    tokens.write_text(" ".join(str(i % 7) for i in range(900)))
    config = common.RunConfig(**{**shape, **common.UPDATES, **common.PLAIN, "freeze": "none", "token_file": tokens})
    session = common.Session.start(config)
    session.run(32, ms=10.0, points=2, multiple=8)
    assert [(point["step"], point["seconds"]) for point in session.curve] == [(0, 0.0), (16, 0.16), (32, 0.32)]
    assert session.trainer.target_step == 32 and session.curve[-1]["loss"] < session.curve[0]["loss"]
    again = common.Session.start(config, session.trainer)
    again.run(8, ms=10.0, points=1)
    assert again.curve[0]["loss"] == session.curve[-1]["loss"] and again.trainer.target_step == 40


def test_motifs_that_only_a_long_memory_connects() -> None:
    motifs = importlib.import_module("examples.dna_motifs")
    bits = motifs.compare(records=20, length=600, steps=3)
    chains = [bits[f"markov {order}"] for order in motifs.ORDERS]
    assert 1.9 < chains[0] < 2.01 and all(each > 0 for each in chains)
    assert 0 < bits["model"] < 4, "judged on the same held-out bases, in bits"
    record = motifs.genome(1, 400, seed=3)[0]
    for opening, closing in zip(motifs.OPENING, motifs.CLOSING, strict=True):
        place = record.find(opening)
        assert place < 0 or record[place + 8 + motifs.GAP :].startswith(closing)


def test_a_catalogue_is_learnt_beyond_its_popularity() -> None:
    catalogue = importlib.import_module("examples.catalogue")
    drawn = catalogue.sessions(2_000, 400, seed=3) - catalogue.RESERVED
    assert drawn.min() >= 0 and drawn.max() < 2_000 and (drawn == 0).mean() > 0.03, "the commonest by Zipf's law"
    stays = (drawn[:, 1:] % 44 == drawn[:, :-1] % 44).mean()
    assert 0.88 < stays < 0.96, "a session changes its theme one time in ten, now and then for the same one"
    found = catalogue.compare(items=2_000, steps=60, width=16, judged=200)
    assert set(found) == {"popularity", "bigram table", *catalogue.HEADS}
    assert all(found[name]["mrr"] > found["popularity"]["mrr"] for name in catalogue.HEADS)


def test_a_set_of_series_as_aeon_ships_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vowels = importlib.import_module("examples.japanese_vowels")
    generator = torch.Generator().manual_seed(0)
    for part in ("TRAIN", "TEST"):
        cases = []
        for i in range(24):
            values = torch.randn(2, 3 + i % 4, generator=generator) + (2 if i % 2 else -2)
            cases.append(":".join(",".join(f"{v:.3f}" for v in channel) for channel in values) + f":{'ab'[i % 2]}")
        (tmp_path / f"Tiny_{part}.ts").write_text("@classLabel true a b\n@data\n" + "\n".join(cases) + "\n")
    data = vowels.open_series(tmp_path, "Tiny")
    table = vowels.confusion(vowels.train(data, seed=0, steps=40), data)
    assert table.sum() == 24 and table.trace() >= 22
    vowels.show(table, data.training.info.class_names)
    assert "precision  recall" in capsys.readouterr().out
