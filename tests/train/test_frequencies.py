"""Frequencies of the classes reach the head that samples them, and no other."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from protomamba.config import ModelConfig
from protomamba.data.labels import open_labelled
from protomamba.data.shards import open_token_file
from protomamba.data.source import StreamSpec
from protomamba.model.heads import HyperspherePrototypes, SoftmaxHead
from protomamba.run_config import RunConfig
from protomamba.train import frequencies
from protomamba.train.build import build_parts
from protomamba.train.frequencies import set_class_frequencies

SPEC = StreamSpec(batch_size=4, seq_len=16)
CLASSES = 100


def head(sample: int = 20) -> HyperspherePrototypes:
    return HyperspherePrototypes(ModelConfig(vocab_size=CLASSES, d_model=4, head_options={"sample": sample}))


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    np.save(tmp_path / "t.npy", np.random.default_rng(0).zipf(1.5, 40_001).clip(max=CLASSES).astype(np.uint16) - 1)
    return tmp_path / "t.npy"


def test_all_of_a_small_source_is_counted(token_file: Path) -> None:
    told = head()
    set_class_frequencies(told, open_token_file(token_file), SPEC)
    assert torch.equal(told.counts, torch.bincount(torch.from_numpy(np.load(token_file))[1:].long(), minlength=CLASSES))
    assert bool(told.told)


def test_of_a_large_one_a_part_spread_evenly(token_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frequencies, "TARGETS", 8_000)
    told = head()
    set_class_frequencies(told, open_token_file(token_file), SPEC)
    assert 7_900 < int(told.counted) <= 8_000
    share_V = torch.bincount(torch.from_numpy(np.load(token_file)).long(), minlength=CLASSES) / 40_001
    assert (told.counts / told.counted - share_V).abs().max() < 0.02


def test_labels_have_counts_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("1 2 3\n4 5\n6\n")
    (tmp_path / "l.txt").write_text("7\n7\n2\n")
    told = head()
    set_class_frequencies(told, open_labelled(tmp_path / "t.txt", tmp_path / "l.txt"), SPEC)
    assert told.counts.nonzero()[:, 0].tolist() == [2, 7] and int(told.counts[7]) == 2


def test_a_head_that_looks_at_every_class_is_not_told(token_file: Path) -> None:
    source = open_token_file(token_file)
    whole = head(sample=CLASSES)
    for left_alone in (whole, SoftmaxHead(ModelConfig(vocab_size=CLASSES, d_model=4))):
        assert not left_alone.samples_classes
        set_class_frequencies(left_alone, source, SPEC)
    assert not whole.counted and not whole.told


def test_a_run_tells_its_head(token_file: Path, tmp_path: Path) -> None:
    fields = {"token_file": token_file, "out_dir": tmp_path / "run", "vocab_size": 1_200, "d_model": 8}
    parts = build_parts(RunConfig(**fields))
    counts_V = parts.trainer.model.state_dict()["head.counts"]
    assert len(counts_V) == 1_200 and 37_000 < int(counts_V.sum()) <= 40_000
