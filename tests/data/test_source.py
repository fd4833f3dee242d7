"""Every source: the same batches whichever way they are asked for, and what it tells a model of itself."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from protomamba.data import in_memory
from protomamba.data.labels import open_labelled
from protomamba.data.prepare import prepare
from protomamba.data.shards import open_token_dir
from protomamba.data.source import Source, StreamSpec
from protomamba.data.windows import Batch

SPEC = StreamSpec(batch_size=3, seq_len=4, seed=5)


def shards(folder: Path) -> Source:
    return in_memory(range(90))


def labelled(folder: Path) -> Source:
    (folder / "x.txt").write_text("".join(f"{i} {i + 1}\n" for i in range(10)))
    (folder / "y.txt").write_text("".join(f"{i % 2}\n" for i in range(10)))
    return open_labelled(folder / "x.txt", folder / "y.txt")


SOURCES = {"shards": shards, "labelled": labelled}


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Source:
    return SOURCES[request.param](tmp_path)


def same(one: Batch, other: Batch) -> bool:
    resets = (one.reset_BL, other.reset_BL)
    return (
        torch.equal(one.tokens_BL, other.tokens_BL)
        and torch.equal(one.targets_BL, other.targets_BL)
        and (resets == (None, None) or torch.equal(*resets))
        and one.cursor == other.cursor
    )


def test_a_batch_is_the_same_by_number_in_turn_and_after_a_restart(source: Source) -> None:
    in_turn, stream = source.stream(SPEC), source.stream(SPEC)
    for index in range(12):
        state = in_turn.state_dict()
        batch = next(in_turn)
        resumed = source.stream(SPEC)
        resumed.load_state_dict(state)
        assert same(batch, stream[index]) and same(batch, next(resumed))


def test_evaluation_repeats_itself_and_a_count_takes_a_part(source: Source) -> None:
    everything, again = list(source.eval_batches(SPEC)), list(source.eval_batches(SPEC))
    assert all(same(one, other) for one, other in zip(everything, again, strict=True))
    assert len(list(source.eval_batches(SPEC, 1))) == 1 < len(everything)


def test_the_parts_of_a_split_are_sources_and_share_nothing(source: Source) -> None:
    def first_tokens(part: Source) -> set[int]:
        return {int(row[0]) for batch in part.eval_batches(SPEC) for row in batch.tokens_BL}

    training, held_out = source.split(0.3, 7)
    assert first_tokens(training) and first_tokens(held_out)
    assert not first_tokens(training) & first_tokens(held_out)
    infos = {replace(part.info, targets=None) for part in (source, training, held_out)}
    assert len(infos) == 1


def test_what_labelled_files_say_of_themselves(tmp_path: Path) -> None:
    source = labelled(tmp_path)
    assert (source.info.vocab_size, source.info.n_class, source.info.longest) == (11, 2, 2)
    assert source.class_counts().tolist() == [5, 5]
    training, _ = source.split(0.3, 1)
    assert training.class_counts().sum() == 7


def test_what_a_prepared_text_says_of_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("äbc" * 5)
    prepare([tmp_path / "a.txt"], tmp_path / "out")
    info = open_token_dir(tmp_path / "out").info
    assert (info.vocab_size, info.eos_token, info.preset) == (257, 256, "bytes")
    assert info.bytes_per_token == 20 / 21 and json.loads(info.tokenizer or "")["kind"] == "bytes"
    assert in_memory([1, 2, 6]).info.vocab_size == 7 and in_memory([1, 2]).info.tokenizer is None
