"""What the Predictor answers: the model's own numbers, whatever the batches are."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from protomamba import ConfigError, Predictor
from protomamba.predict import batching
from tests.predict.models import model, saved, sequences


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a few short sequences need several windows, batches and chunks."""
    monkeypatch.setattr(batching, "WINDOW_ROWS", 20)
    monkeypatch.setattr(batching, "BATCH_STEPS", 120)
    monkeypatch.setattr(batching, "CHUNK_STEPS", 16)


@pytest.mark.parametrize("layer", ["mamba", "compact"])
def test_vectors_are_those_of_each_sequence_alone(layer: str) -> None:
    net, rows = model(layer=layer), sequences(53)
    found = list(Predictor(net).embeddings(rows))
    for row, vector in zip(rows, found, strict=True):
        z_1LD, _ = net.features(torch.tensor([row]))
        np.testing.assert_allclose(vector, z_1LD[0, -1].detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("head", ["softmax", "hpn"])
def test_next_items_are_the_likeliest(head: str) -> None:
    net, rows = model(head=head), sequences(30)
    found = list(Predictor(net, reserved=(0, 39)).next_items(rows, top_k=5))
    for row, best in zip(rows, found, strict=True):
        logits_V = net.head.logits(net.features(torch.tensor([row]))[0][:, -1:])
        assert logits_V is not None
        logits_V = logits_V[0, 0].detach().clone()
        logits_V[[0, 39]] = -torch.inf
        chances_V = logits_V.softmax(-1)
        assert best.scores == pytest.approx(sorted(chances_V.tolist(), reverse=True)[:5], rel=1e-4)
        assert [float(chances_V[token]) for token in best.tokens] == pytest.approx(best.scores, rel=1e-4)
        assert not {0, 39} & set(best.tokens)


def test_what_was_seen_and_what_is_reserved_is_not_offered() -> None:
    rows = [list(range(38)), [5], [1] * 30]
    found = list(Predictor(model(), reserved=(0,)).next_items(rows, top_k=40, exclude_seen=True))
    for row, best in zip(rows, found, strict=True):
        assert set(best.tokens) == set(range(40)) - set(row) - {0}
        assert best.scores == sorted(best.scores, reverse=True) and all(map(math.isfinite, best.scores))


def test_class_probabilities_after_the_whole_sequence() -> None:
    net, rows = model(n_class=3), sequences(25)
    for row, chances in zip(rows, Predictor(net).class_probabilities(rows), strict=True):
        logits_BLV = net.head.logits(net.features(torch.tensor([row]))[0][:, -1:])
        assert logits_BLV is not None
        np.testing.assert_allclose(chances, logits_BLV[0, 0].softmax(-1).detach().numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("head", ["softmax", "hpn"])
def test_likelihoods_are_the_sum_over_tokens(head: str) -> None:
    net, rows = model(head=head), [*sequences(30), [3], list(range(40)) * 3]
    for row, found in zip(rows, Predictor(net).log_likelihoods(rows, per_token=True), strict=True):
        logits_BLV = net.head.logits(net.features(torch.tensor([row]))[0])
        assert logits_BLV is not None
        logs_LV = logits_BLV[0].detach().log_softmax(-1)
        wanted = [float(logs_LV[i, token]) for i, token in enumerate(row[1:])]
        assert found.tokens == pytest.approx(wanted, rel=1e-4, abs=1e-5) and found.count == len(row) - 1
        assert found.log_likelihood == pytest.approx(sum(wanted), rel=1e-5, abs=1e-6)
    assert next(Predictor(net).log_likelihoods([[1, 2]])).tokens is None


def test_a_window_is_worked_on_before_the_next_is_read() -> None:
    read = 0

    def source() -> Iterator[list[int]]:
        nonlocal read
        for row in sequences(200):
            read += 1
            yield row

    answers = Predictor(model()).embeddings(source())
    next(answers)
    assert read == 20
    assert len(list(answers)) == 199


def test_batches_are_of_like_length_and_hold_every_row_once() -> None:
    lengths = [len(row) for row in sequences(100)]
    found = list(batching.batches(lengths))
    assert sorted(row for rows in found for row in rows) == list(range(100))
    assert all(len(rows) * lengths[rows[0]] <= 120 for rows in found)
    assert [lengths[rows[0]] for rows in found] == sorted((lengths[rows[0]] for rows in found), reverse=True)


def test_many_windows_ask_for_products_of_few_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """oneDNN's library keeps memory for each number of rows that it has seen: predict grew with its input."""
    for name, value in (("WINDOW_ROWS", 50), ("BATCH_STEPS", 1_000), ("CHUNK_STEPS", 2_048)):
        monkeypatch.setattr(batching, name, value)
    net, drawn = model(), np.random.default_rng(0)
    scored, shapes = list[int](), list[tuple[int, ...]]()
    logits = net.head.logits
    monkeypatch.setattr(net.head, "logits", lambda z: (scored.append(len(z)), logits(z))[1])
    net.norm_f.register_forward_hook(lambda _, given, found: shapes.append(tuple(found.shape[:2])))
    rows = [drawn.integers(1, 40, length) for length in drawn.integers(8, 120, 2_000)]
    assert sum(found.count for found in Predictor(net).log_likelihoods(rows)) == sum(map(len, rows)) - len(rows)
    assert len(shapes) > 150 and len(set(shapes)) < 80 and len(set(scored)) < 80


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ([], "sequence 1: expected at least one step, found none"),
        ([1, 40], "sequence 1: token 40 at place 2: expected 0 to 39"),
        ([-1], "token -1 at place 1"),
        (np.array([0.5, 1.0]), "expected integers, found float64"),
    ],
)
def test_a_sequence_that_the_model_cannot_read_is_named(row: list[int], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        list(Predictor(model()).embeddings([[1], row]))


def test_from_a_checkpoint(tmp_path: Path) -> None:
    net = model()
    loaded = Predictor.from_checkpoint(saved(tmp_path))
    assert next(loaded.embeddings([[1, 2]])).tolist() == next(Predictor(net).embeddings([[1, 2]])).tolist()
    with pytest.raises(ConfigError, match="top_k 0"):
        loaded.next_items([[1]], top_k=0)
