"""Promise 3 of the reliability design: no damage to a checkpoint goes unseen, and its place is named."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from protomamba.checkpoint import file as checkpoint
from protomamba.checkpoint.file import CheckpointError


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    parts = {
        "model": {"w": torch.randn(16, 3, generator=generator), "b": torch.zeros(8, dtype=torch.bfloat16)},
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(16, 3), "step": torch.tensor(3.0)}}, "lr": 0.1},
        "rng": {"torch": torch.randint(0, 256, (64,), dtype=torch.uint8, generator=generator)},
        "cursor": {"epoch": 1, "index": 77},
    }
    path = tmp_path / "sample.safetensors"
    checkpoint.save(path, parts, config={"lr": 0.1, "seed": 2**70}, info={"step": 3})
    return path


def flip_bit(data: bytearray, rng: random.Random) -> int:
    place = rng.randrange(len(data))
    data[place] ^= 1 << rng.randrange(8)
    return place


def flip_bits(data: bytearray, rng: random.Random) -> int:
    return min(flip_bit(data, rng) for _ in range(3))


def truncate(data: bytearray, rng: random.Random) -> int:
    place = rng.randrange(len(data))
    del data[place:]
    return place


def overwrite(data: bytearray, rng: random.Random) -> int:
    """A block of zeros or noise, as a lost sector leaves it."""
    place = rng.randrange(len(data))
    size = min(rng.choice([1, 16, 512]), len(data) - place)
    data[place : place + size] = rng.choice([bytes(size), rng.randbytes(size)])
    return place


def extend(data: bytearray, rng: random.Random) -> int:
    place = len(data)
    data.extend(bytes(rng.randrange(1, 20)))
    return place


def swap(data: bytearray, rng: random.Random) -> int:
    """Two pieces of the file in each other's place."""
    a, b = sorted(rng.sample(range(0, len(data) - 8, 8), 2))
    data[a : a + 8], data[b : b + 8] = data[b : b + 8], data[a : a + 8]
    return a


DAMAGES: list[Callable[[bytearray, random.Random], int]] = [
    flip_bit,
    flip_bit,
    truncate,
    flip_bits,
    overwrite,
    extend,
    swap,
]


def detected(path: Path, data: bytes) -> CheckpointError | None:
    path.write_bytes(data)
    try:
        checkpoint.load(path)
    except CheckpointError as error:
        return error
    return None


def part_at(path: Path, place: int) -> str:
    """The part of an undamaged file that the byte at `place` belongs to."""
    data_start = 8 + int.from_bytes(path.read_bytes()[:8], "little")
    if place < data_start:
        return "header"
    for tensor in checkpoint.describe_checkpoint(path)["tensors"]:
        data_start += tensor["bytes"]
        if place < data_start:
            return str(tensor["part"])
    raise AssertionError(place)


def damage_trials(sample: Path, trials: int, seed: int) -> int:
    whole, rng = sample.read_bytes(), random.Random(seed)
    damaged_file = sample.with_name("damaged.safetensors")
    done = 0
    while done < trials:
        damage = DAMAGES[done % len(DAMAGES)]
        data = bytearray(whole)
        place = damage(data, rng)
        if data == whole:
            continue
        done += 1
        error = detected(damaged_file, data)
        assert error is not None, f"{damage.__name__} at {place} was not seen"
        assert str(error).startswith(f"{damaged_file}: {error.part}: ")
        if damage is flip_bit:
            assert error.part == part_at(sample, place), str(error)
        if damage is truncate:
            assert error.part in ("header", "length")
        assert checkpoint.verify(damaged_file) != []
    return done


def test_random_damage_is_always_seen(sample: Path) -> None:
    assert damage_trials(sample, 300, seed=1) == 300


@pytest.mark.slow
def test_ten_thousand_random_damages_are_all_seen(sample: Path) -> None:
    assert damage_trials(sample, 10_000, seed=2) == 10_000


@pytest.mark.slow
def test_every_single_bit_and_every_length_is_seen(sample: Path) -> None:
    whole = sample.read_bytes()
    path = sample.with_name("damaged.safetensors")
    for place in range(len(whole)):
        assert detected(path, whole[:place]) is not None, place
        for bit in range(8):
            data = bytearray(whole)
            data[place] ^= 1 << bit
            assert detected(path, data) is not None, (place, bit)


def test_a_file_that_shrinks_while_it_is_read(sample: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from protomamba.checkpoint import layout as checkpoint_format

    read_header = checkpoint_format.read_header

    def read_and_shrink(path: Path, *rest: Any) -> Any:
        header = read_header(path, *rest)
        with open(path, "r+b") as file:
            file.truncate(header.data_start + 10)
        return header

    monkeypatch.setattr(checkpoint_format, "read_header", read_and_shrink)
    with pytest.raises(CheckpointError, match="the file ends inside tensor"):
        checkpoint.load(sample)


def test_all_damaged_tensors_are_listed(sample: Path) -> None:
    data = bytearray(sample.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start] ^= 1
    data[-1] ^= 1
    sample.write_bytes(data)
    problems = checkpoint.verify(sample)
    assert len(problems) == 2 and all(str(sample) in problem and "is damaged" in problem for problem in problems)
    described = checkpoint.describe_checkpoint(sample)
    assert not described["ok"] and sum(not tensor["ok"] for tensor in described["tensors"]) == 2
    with pytest.raises(CheckpointError, match=r"model: tensor 'model\.w' is damaged .* use an older checkpoint"):
        checkpoint.load(sample)
