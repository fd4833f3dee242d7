"""Promise 3: damage to a run's checkpoint or to a shard is seen and named, and `--resume auto` falls back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from protomamba.checkpoint.folder import find_resumable
from protomamba.data.files import reference
from protomamba.data.formats import TokenWriter
from protomamba.data.manifest import Manifest, ShardEntry
from protomamba.data.shards import open_token_dir
from protomamba.errors import UserError
from tests.marks import slow
from tests.reliability.forked import ForkServer
from tests.reliability.promises import Trials
from tests.runs import flags, token_file


def damaged(whole: bytes, rng: random.Random) -> bytes:
    """A flipped bit in three trials of four, else a truncation."""
    place = rng.randrange(len(whole))
    if rng.random() < 0.25:
        return whole[:place]
    return whole[:place] + bytes([whole[place] ^ (1 << rng.randrange(8))]) + whole[place + 1 :]


@pytest.mark.parametrize("count", [100, slow(10_000)])
def test_a_damaged_latest_is_named_and_the_one_before_it_taken(
    count: int, server: ForkServer, tmp_path: Path, trials: Callable[[int], Trials]
) -> None:
    counted, rng, tokens, folder = trials(3), random.Random(count), token_file(tmp_path), tmp_path / "run"
    assert server.run(flags(folder, tokens, "--steps", 8, "--keep-last", 1)).code == 0
    latest = folder / "latest.safetensors"
    (folder / "best.safetensors").unlink()  # it is the same file by another name
    whole = latest.read_bytes()
    for _ in range(count):
        latest.unlink()
        latest.write_bytes(damaged(whole, rng))
        found = find_resumable(folder)
        if found is None or found.path.name != "step-00000004.safetensors":
            counted.add(f"took {found and found.path}")
        else:
            named = found.warnings[0].startswith(f"{latest}: ") and len(found.warnings[0].split(": ")) >= 3
            counted.add(None if named and "resuming from" in found.warnings[-1] else f"said {found.warnings}")
    ended = server.run(flags(folder, tokens, "--steps", 8, "--resume", "auto"))
    assert ended.code == 0 and "latest.safetensors: " in ended.output and "resuming from" in ended.output
    counted.finish()


def shards_with_manifest(folder: Path) -> list[Path]:
    folder.mkdir()
    entries = []
    for number in range(3):
        with open(folder / f"{number}.bin", "w+b") as file:
            writer = TokenWriter(file, "<u2")
            writer.write((np.arange(300 + number) % 13).astype(np.uint16))
            writer.finish()
        found = reference(folder / f"{number}.bin")
        entries.append(ShardEntry(found.path.name, writer.tokens, found.size, writer.max_token, found.sha256))
    Manifest(folder, "uint16", 13, None, {}, {"what": "a test"}, entries).write()
    return sorted(folder.glob("*.bin"))


@pytest.mark.parametrize("count", [100, slow(10_000)])
def test_a_damaged_shard_of_a_manifest_is_named(count: int, tmp_path: Path, trials: Callable[[int], Trials]) -> None:
    counted, rng = trials(3), random.Random(count)
    folder = tmp_path / "shards"
    paths = shards_with_manifest(folder)
    wholes = {path: path.read_bytes() for path in paths}
    open_token_dir(folder, "bin")
    for _ in range(count):
        path = rng.choice(paths)
        path.write_bytes(damaged(wholes[path], rng))
        try:
            open_token_dir(folder, "bin")
            counted.add(f"{path.name}: not seen")
        except UserError as error:
            counted.add(None if path.name in str(error) else f"{path.name}: {error}")
        path.write_bytes(wholes[path])
    assert open_token_dir(folder, "bin").tokens == 903
    counted.finish()
