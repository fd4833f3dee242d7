"""Small real runs for tests: tokens with structure, a tiny model, the command line in and out of process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from protomamba.bits import differences
from protomamba.checkpoint import file as checkpoint
from protomamba.cli.main import main

TINY_FLAGS = {
    **{"--d-model": 8, "--d-state": 4, "--base-layers": 1, "--target-layers": 1, "--freeze": "none"},
    **{"--bp-cadence-steps": 1, "--batch-size": 2, "--seq-len": 8, "--lr": 1e-2, "--eval-batches": 2},
    **{"--val-every": 4, "--save-every": 4, "--log-every": 1, "--threads": 1},
}
TINY = [str(part) for pair in TINY_FLAGS.items() for part in pair]


def token_file(folder: Path, count: int = 600, vocab: int = 13, name: str = "tokens.txt") -> Path:
    """Tokens that a model can learn: a counting sequence with a step that changes now and then."""
    path = folder / name
    path.write_text(" ".join(str((i + i // 50) % vocab) for i in range(count)))
    return path


def flags(out_dir: Path, tokens: Path, *more: object) -> list[str]:
    """The command line of a tiny training run; later flags win over earlier ones."""
    return ["train", *TINY, "--out-dir", str(out_dir), "--token-file", str(tokens), *map(str, more)]


def train(out_dir: Path, tokens: Path, *more: object) -> int:
    """Run it in this process; the exit code."""
    return main(flags(out_dir, tokens, *more))


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    """The real command line in a process of its own, output captured."""
    return subprocess.Popen(
        [sys.executable, "-m", "protomamba", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


def metrics(out_dir: Path, event: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, all or those of one event; fails if one does not parse."""
    lines = [json.loads(line) for line in (out_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if event is None or line["event"] == event]


def losses(out_dir: Path) -> dict[int, float]:
    """The training loss of every logged step."""
    return {line["step"]: line["loss"] for line in metrics(out_dir, "train")}


def same_state(one: Path, other: Path) -> None:
    """Assert that two checkpoints hold the same parts, bit for bit."""
    assert_equal(checkpoint.load(one).parts, checkpoint.load(other).parts, "parts")


def assert_equal(a: Any, b: Any, where: str) -> None:
    """Assert that nested states of tensors and plain values are the same to the bit, naming where they are not."""
    found = [f"{where}: {difference}" for difference in differences(a, b)]
    assert not found, found[:5]
