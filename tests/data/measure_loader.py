"""Measure the loader: its cost beside a step, threads against processes, and 100 million tokens in 100 shards.

    python tests/data/measure_loader.py cost        # microseconds the training loop waits for a batch of 8 x 64
    python tests/data/measure_loader.py scale       # start, memory and look-ups of issue 4, item 6

Figures are medians, the variants interleaved. The same look-ups run as a slow test in test_scale.py.
"""

from __future__ import annotations

import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from protomamba.data import Prefetcher, TokenStream, in_memory, open_token_dir, open_token_file
from protomamba.data.formats import TokenWriter
from protomamba.storage import atomic_file

ROUNDS, STEPS = 3, 40


def write_shards(folder: Path, shards: int, tokens: int, vocab: int = 50_000) -> None:
    """Shards of random uint16 tokens in protomamba's layout."""
    for number in range(shards):
        with atomic_file(folder / f"shard-{number:05d}.bin") as file:
            writer = TokenWriter(file, "<u2")
            writer.write(np.random.default_rng(number).integers(0, vocab, tokens, dtype=np.uint16))
            writer.finish()


def resident_mib() -> float:
    """Resident memory of this process now, in MiB (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / 2**20


def step() -> None:
    """Something of a training step's kind: native code on all threads that evicts the caches."""
    value = torch.ones(700, 700)
    for _ in range(8):
        value = torch.mm(value, value) * 1e-3


def waits(batches: Iterator[Any]) -> list[float]:
    """Microseconds waited for each batch, with a step between them."""
    found = []
    for _ in range(STEPS):
        start = time.perf_counter()
        next(batches)
        found.append((time.perf_counter() - start) * 1e6)
        step()
    return found[5:]


_stream: TokenStream


def _open_in_process(path: str, packed: bool) -> None:
    global _stream
    _stream = TokenStream(open_token_file(path), batch_size=8, seq_len=64, seed=1, packed=packed)


def _batch_in_process(index: int) -> tuple[Any, Any]:
    batch = _stream.batch(index)
    return batch.tokens_BL.numpy(), batch.targets_BL.numpy()


def cost(folder: Path) -> None:
    """Print the wait for a batch with 0, 1, 2 and 4 threads and with one process."""
    write_shards(folder, 1, 20_000_000)
    path = folder / "shard-00000.bin"
    found: dict[tuple[str, str], list[float]] = {}
    for _ in range(ROUNDS):
        for packed in (True, False):
            order = "packed" if packed else "shuffled"
            for workers in (0, 1, 2, 4):
                stream = TokenStream(open_token_file(path), batch_size=8, seq_len=64, seed=1, packed=packed)
                with Prefetcher(stream, workers) as batches:
                    found.setdefault((order, f"{workers} threads"), []).extend(waits(batches))
            with multiprocessing.get_context("spawn").Pool(1, _open_in_process, (str(path), packed)) as pool:
                found.setdefault((order, "1 process"), []).extend(waits(pool.imap(_batch_in_process, range(STEPS))))
                pool.close()
                pool.join()
    for (order, who), values in sorted(found.items()):
        print(f"{order:9} {who:10} wait {statistics.median(values):6.0f} us a batch of 8 x 64")


def scale(folder: Path, report: Callable[[str], None] = print) -> dict[str, float]:
    """100 million tokens in 100 shards: start to first batch, memory, 1,000 look-ups against a replay."""
    write_shards(folder, 100, 1_000_000)
    start = time.perf_counter()
    open_token_dir(folder, "bin")
    report(f"index built: {time.perf_counter() - start:.2f} s")
    open_token_dir(folder, "bin")  # entries of files just written are checked once more, then believed
    TokenStream(in_memory(range(100)), batch_size=1, seq_len=8, seed=0).batch(0)  # torch's own first-use memory
    before = resident_mib()
    start = time.perf_counter()
    shards = open_token_dir(folder, "bin")
    streams = [TokenStream(shards, batch_size=8, seq_len=64, seed=1, packed=packed) for packed in (True, False)]
    streams[0].batch(0)
    figures = {"start_s": time.perf_counter() - start}
    for stream in streams:
        figures["lookups_equal"] = figures.get("lookups_equal", 0) + compare_with_replay(stream, 500)
    figures["resident_mib"] = resident_mib() - before
    report(
        f"start to first batch {figures['start_s']:.3f} s; loader's resident memory {figures['resident_mib']:.1f} MiB"
    )
    report(f"{figures['lookups_equal']:.0f} of 1000 random (epoch, index) look-ups equal the sequential replay")
    return figures


def compare_with_replay(stream: TokenStream, count: int) -> int:
    """How many of `count` look-ups in random order equal the batches of an iteration over three epochs' starts."""
    generator = np.random.default_rng(3)
    per_epoch = int(stream.steps_per_epoch)
    replay = []
    for epoch in (0, 1, 4):
        stream.position = epoch * per_epoch + int(generator.integers(per_epoch))
        first = stream.position
        replay += [(first + number, next(stream).tokens_BL) for number in range(count // 3 + 1)]
    replay = replay[:count]
    chosen = generator.permutation(len(replay))
    return sum(bool(torch.equal(stream.batch(replay[i][0]).tokens_BL, replay[i][1])) for i in chosen)


def main() -> None:
    """Run the measurement named on the command line."""
    if sys.argv[1:] not in (["cost"], ["scale"]):
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as folder:
        {"cost": cost, "scale": scale}[sys.argv[1]](Path(folder))


if __name__ == "__main__":
    main()
